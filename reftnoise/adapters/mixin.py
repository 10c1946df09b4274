"""What Trainers, devices and the hub need of a model, apart from running it."""

import inspect
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self, Unpack

from .._util.errors import brief, nearest, value_errors, warn_once
from .._util.files import local_path
from ..engine.base.peft import inner_model, is_peft_model
from ..engine.base.saved_peft import restore_section
from ..engine.base.sharding import device_of, size
from ..engine.base.sites import trained_modules
from ..interventions import NoiseIntervention
from . import saving
from .directory import AdapterFiles
from .frozen import freeze
from .library import CallChoiceMixin
from .location import CONFIG_NAME, WEIGHTS_NAME, checkpoint_adapter, local_directory
from .pyreft.methods import PyreftMethods
from .vocabulary import room_for

logger = logging.getLogger(__name__)


class FormOptions(TypedDict, total=False):
    """Arguments of transformers and PEFT about the form of saved files."""

    save_function: Any
    safe_serialization: bool
    max_shard_size: int | str | None
    save_peft_format: bool
    save_original_format: bool
    use_temp_dir: bool | None
    variant: str | None
    distributed_checkpoint: bool
    selected_adapters: list[str] | None
    save_embedding_layers: bool | str
    path_initial_model_for_weight_conversion: str | None


class SaveOptions(FormOptions, total=False):
    """Further arguments of `save_pretrained` in transformers and PEFT: those of an upload, too."""

    repo_id: str
    commit_message: str
    commit_description: str | None
    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool


_OF_UPLOADS = SaveOptions.__annotations__.keys() - FormOptions.__annotations__.keys()

_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "variant": (None,),
    "distributed_checkpoint": (False,),
    "selected_adapters": (None, ["default"]),
    "save_embedding_layers": ("auto", False),
    "path_initial_model_for_weight_conversion": (None,),
}
"""Options of which other values ask for files that an adapter does not have."""


def _upload_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are about uploads, once all are known and possible."""
    values = dict(options)
    for name, value in values.items():
        if name not in SaveOptions.__annotations__:
            raise TypeError(
                f"save_pretrained has no argument {name!r}; "
                f"{nearest(name, SaveOptions.__annotations__)}"
            )
        if name in _POSSIBLE and value not in _POSSIBLE[name]:
            expected = " or ".join(repr(known) for known in _POSSIBLE[name])
            raise ValueError(f"{name} {brief(value)}: expected {expected}")
    if values.get("safe_serialization") is False:
        warn_once(logger, "safe_serialization False: adapters are saved as safetensors")
    return {name: value for name, value in values.items() if name in _OF_UPLOADS}


class AdapterMixin(CallChoiceMixin, PyreftMethods):
    """A base with units: its parameters, their devices, and how they are saved and loaded."""

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base takes `num_items_in_batch`, as transformers' Trainer determines it."""
        base = inner_model(self.model)
        accepts = getattr(base, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(base.forward).parameters.values()
            accepts = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return bool(accepts)

    @property
    def device(self) -> torch.device:
        """The device that the base computes on, also where its weights are offloaded."""
        return self.get_device()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the base and the units. A base refuses what its weights cannot be."""
        inner_model(self.model).to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def half(self) -> Self:
        """Cast the base and the units to float16; as `to` for a base that cannot be cast."""
        inner_model(self.model).half()
        return super().half()

    def float(self) -> Self:
        """Cast the base and the units to float32; as `to` for a base that cannot be cast."""
        inner_model(self.model).float()
        return super().float()

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move the base and the units to a GPU; as `to` for a base that cannot be moved."""
        inner_model(self.model).cuda(device)
        return super().cuda(device)

    def dequantize(self, dtype: torch.dtype | None = None) -> Self:
        """Dequantise the base's weights in place, as transformers does. Returns the model."""
        inner_model(self.model).dequantize(**({} if dtype is None else {"dtype": dtype}))
        return self

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of the base, as transformers counts them, and of the units."""
        tensors: list[Tensor] = list(self.interventions.parameters())
        tensors += self.interventions.buffers() if return_buffers else ()
        own = sum(tensor.nelement() * tensor.element_size() for tensor in tensors)
        return own + int(self.model.get_memory_footprint(return_buffers))

    def set_device(self, device: torch.device | str | None, set_model: bool = True) -> None:
        """Move everything to `device`; None puts each unit where its site is."""
        if device is not None:
            (self if set_model else self.interventions).to(device)
            return
        for placed in self.engine.units:
            its_device = device_of(placed.site.module) or device_of(self.model)
            placed.unit.to(its_device or "cpu")

    def disable_model_gradients(self) -> None:
        """Freeze the base, but for PEFT's parameters and the config's `modules_to_save`.

        Where the config names none, the head of a classifier stays trained.
        """
        if not is_peft_model(self.model):
            self.model.requires_grad_(False)
        trained = trained_modules(self.model, self.reft_config.modules_to_save)
        for module in trained.values():
            module.requires_grad_(True)
        if trained and self.reft_config.modules_to_save is None:
            count = sum(size(p) for module in trained.values() for p in module.parameters())
            logger.warning(
                "%s of %s (%s parameters) is trained with the units: modules_to_save=[] in the "
                "ReftConfig freezes it",
                ", ".join(trained),
                type(inner_model(self.model)).__name__,
                f"{count:,d}",
            )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the base, as transformers counts them, and of the units."""
        units = self.interventions.parameters()
        own = sum(p.numel() for p in units if p.requires_grad or not only_trainable)
        return own + int(self.model.num_parameters(only_trainable, exclude_embeddings))

    def parameter_counts(self) -> tuple[int, int, int]:
        """Trainable parameters of the units and of the base, and all of the base."""
        return saving.count_parameters(self.interventions, self.model)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters, and their share of the base's."""
        units, base, total = self.parameter_counts()
        print(
            f"trainable intervention params: {units:,d} || trainable model params: {base:,d}\n"
            f"model params: {total:,d} || trainable%: {100 * (units + base) / total:.4f}"
        )

    # -- saving and loading ----------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        **options: Unpack[SaveOptions],
    ) -> None:
        """Write the adapter: the units and what is trained of the base (see `saving`).

        Vectors that are added are written times the model's `scale`: loaded, they act with scale 1
        as they did. Other units have no place for it, so that a warning says that it is not saved.

        Args:
            save_directory: path of the directory, created if needed.
            state_dict: tensors to write instead of the model's own, when these are sharded. What
                is frozen of the base is left out.
            is_main_process: whether this process writes.
            push_to_hub: whether to upload it, too, by default to a repository of the directory's
                name.
            options: further arguments of `push_to_hub`, and those of transformers and PEFT about
                the form of files, of which an adapter has one: they have no effect.

        Raises:
            ValueError: an option that asks for another form.
            TypeError: an argument that neither transformers nor PEFT has.
        """
        if isinstance(state_dict, bool):
            raise ValueError(
                f"state_dict {state_dict}: expected tensors by name; name the argument that is "
                "meant, such as is_main_process"
            )
        upload = _upload_options(options)
        if is_main_process:
            state = None if state_dict is None else saving.without_frozen(self, state_dict)
            saving.save_adapter(self, save_directory, self._scaled(state))
            if push_to_hub:
                name = local_path(save_directory, "save_directory").absolute().name
                self.push_to_hub(**{"repo_id": name, **upload})

    def _scaled(self, state: dict[str, Tensor] | None = None) -> dict[str, Tensor] | None:
        """A state to save, in which vectors that are added hold the scale; None is the own one."""
        if self.scale == 1.0:
            return state
        units = [p for p in self.engine.units if not isinstance(p.unit, NoiseIntervention)]
        names = [getattr(placed.unit, "proportional_to", None) for placed in units]
        if None in names:
            why = f"{type(units[names.index(None)].unit).__name__} has no place for it"
            logger.warning("scale %s is not saved, but 1: %s; set it later", self.scale, why)
            return state
        state = saving.without_frozen(self, self.state_dict()) if state is None else state
        vectors = [f"interventions.{p.key}.{name}" for p, name in zip(units, names, strict=True)]
        return state | {name: self.scale * state[name] for name in vectors}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = "Upload adapter",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Unpack[FormOptions],
    ) -> str:
        """Upload the adapter directory; arguments as in `huggingface_hub`. Returns its address.

        Options are those of `save_pretrained` about the form of files.
        """
        _upload_options(options)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            saving.save_adapter(self, directory, self._scaled(), keeps_path=False)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit)

    def save(
        self,
        save_directory: str | Path,
        save_to_hf_hub: bool = False,
        hf_repo_name: str | None = None,
        include_model: bool = True,
    ) -> None:
        """pyreft's name for `save_pretrained`, and `push_to_hub` if asked.

        `include_model=False` leaves what is trained of the base out of the directory.
        """
        self.save_intervention(save_directory, include_model)
        if save_to_hf_hub:
            if hf_repo_name is None:
                raise ValueError("save_to_hf_hub needs hf_repo_name, such as 'user/adapter'")
            self.push_to_hub(hf_repo_name)

    def save_intervention(self, save_directory: str | Path, include_model: bool = True) -> None:
        """Write the adapter, as `save` does."""
        state = None if include_model else self._units_state()
        saving.save_adapter(self, save_directory, self._scaled(state))

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        directory: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        allow_nan: bool = False,
    ) -> Self:
        """Wrap `model` with the adapter of a directory or a hub repository, in evaluation mode.

        Reads the directory and the base alone. `allow_nan` loads numbers that are not finite, too;
        other arguments, and errors, as of `saving.read_adapter`.
        """
        if isinstance(directory, nn.Module):
            raise ValueError(
                "the arguments are swapped: ReftModel.from_pretrained(model, directory)"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a model of transformers, got {brief(model)}")
        adapter = _read(directory, model, revision=revision, token=token)
        return cls._of(adapter, model, allow_nan=allow_nan)

    @classmethod
    def _of(
        cls,
        adapter: AdapterFiles,
        model: PreTrainedModel,
        include_model: bool = True,
        allow_nan: bool = False,
    ) -> Self:
        with room_for(adapter, model):
            config = saving.buildable_config(adapter, model, include_model, allow_nan)
            with value_errors(adapter.config_path):
                reft_model = cls(config, model)
            if config is not adapter.config:
                restore_section(reft_model.model, adapter.config.peft or {})
                reft_model.reft_config = adapter.config
            saving.load_trained(reft_model, adapter, include_model, allow_nan)
        reft_model.set_device(None)
        return reft_model.eval()

    @classmethod
    def load(
        cls,
        load_directory: str | Path,
        model: PreTrainedModel,
        local_directory: str | Path | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = True,
    ) -> Self:
        """pyreft's name and order of arguments for `from_pretrained`.

        Args:
            load_directory: directory or hub repository of an adapter of ours or of pyreft.
            model: the base.
            local_directory: directory to which a hub repository is downloaded.
            from_huggingface_hub: whether to pass over a directory of the repository's name.
            include_model: whether to load what was trained of the base, too.
        """
        adapter = _read(
            load_directory, model, is_on_hub=from_huggingface_hub, local_dir=local_directory
        )
        return cls._of(adapter, model, include_model)

    def load_adapter(
        self,
        directory: str | Path,
        adapter_name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Load a saved adapter next to the model's own units, for inference.

        `set_adapter` and `adapter_names` choose it by its name; an adapter of that name is
        replaced. Other arguments, and errors, as of `from_pretrained`.

        Raises:
            ValueError: the adapter has weights of the base, or this model changes them itself.
        """
        if self.reft_config.peft or self.reft_config.modules_to_save:
            raise ValueError(
                "this model trains weights of the base, for which other adapters were not trained: "
                "load them into get_reft_model(base)"
            )
        self.adapters.expect_free(adapter_name)
        adapter = _read(directory, self.model, revision=revision, token=token)
        self.adapters.put(adapter_name, freeze(adapter, self.model))


def _read(directory: str | Path, model: PreTrainedModel, **download: Any) -> AdapterFiles:
    """An adapter of ours or of pyreft; further arguments are those of `local_directory`."""
    directory = checkpoint_adapter(directory)
    place = local_directory(directory, [CONFIG_NAME, WEIGHTS_NAME], **download)
    if not (place / CONFIG_NAME).is_file():
        from .pyreft.loading import FILES, is_pyreft, read_pyreft_adapter

        place = local_directory(directory, FILES, **download)
        if is_pyreft(place):
            return read_pyreft_adapter(place, model)
    return saving.read_adapter(place, model)
