"""What Trainers, devices and the hub need of a model, apart from running it."""

import inspect
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from .._util.errors import brief
from ..engine.base.peft import inner_model, is_peft_model
from ..engine.base.sharding import device_of, size
from ..engine.base.sites import trained_modules
from . import saving
from .directory import AdapterFiles
from .frozen import freeze
from .library import CallChoiceMixin
from .location import CONFIG_NAME, WEIGHTS_NAME, checkpoint_adapter, local_directory
from .pyreft.methods import PyreftMethods
from .vocabulary import make_room

logger = logging.getLogger(__name__)


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
    ) -> None:
        """Write the adapter: the units and what is trained of the base (see `saving`).

        Args:
            save_directory: path of the directory, created if needed.
            state_dict: tensors to write instead of the model's own, when these are sharded. What
                is frozen of the base is left out.
            is_main_process: whether this process writes.
        """
        if is_main_process:
            state = None if state_dict is None else saving.without_frozen(self, state_dict)
            saving.save_adapter(self, save_directory, state)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the adapter directory; arguments as in `huggingface_hub`. Returns its address."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message,
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

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        directory: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Wrap `model` with the adapter of a directory or a hub repository, in evaluation mode.

        Arguments and errors as of `saving.read_adapter`.
        """
        if isinstance(directory, nn.Module):
            raise ValueError(
                "the arguments are swapped: ReftModel.from_pretrained(model, directory)"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a model of transformers, got {brief(model)}")
        return cls._of(_read(directory, model, revision=revision, token=token), model)

    @classmethod
    def _of(cls, adapter: AdapterFiles, model: PreTrainedModel, include_model: bool = True) -> Self:
        make_room(adapter, model)
        reft_model = cls(adapter.config, model)
        saving.load_trained(reft_model, adapter, include_model)
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
