"""What Trainers, devices and the hub need of a model, apart from running it."""

import inspect
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from .._util.errors import brief
from ..config.representations import ReftConfig
from ..engine.base.peft import inner_model, is_peft_model
from ..engine.base.sharding import device_of
from ..engine.base.sites import trained_modules
from ..engine.hooks import Engine
from . import saving
from .frozen import freeze
from .library import AdapterChoice, AdapterLibrary


class AdapterMixin(nn.Module):
    """A base with units: its parameters, their devices, and how they are saved and loaded."""

    model: PreTrainedModel
    interventions: nn.ModuleDict
    reft_config: ReftConfig
    adapters: AdapterLibrary
    """Loaded adapters by name."""
    engine: Engine
    """The base with the model's own units."""

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base takes `num_items_in_batch`, as transformers' Trainer determines it."""
        base = inner_model(self.model)
        accepts = getattr(base, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(base.forward).parameters.values()
            accepts = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return bool(accepts)

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
        for module in trained_modules(self.model, self.reft_config.modules_to_save).values():
            module.requires_grad_(True)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of the base, as transformers counts them, and of the units."""
        units = self.interventions.parameters()
        own = sum(p.numel() for p in units if p.requires_grad or not only_trainable)
        return own + int(self.model.num_parameters(only_trainable, exclude_embeddings))

    def count_parameters(self) -> tuple[int, int, int]:
        """Trainable parameters of the units and of the base, and all of the base."""
        return saving.count_parameters(self.interventions, self.model)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters, and their share of the base's."""
        units, base, total = self.count_parameters()
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
    ) -> None:
        """pyreft's name for `save_pretrained`, and `push_to_hub` if asked."""
        self.save_pretrained(save_directory)
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
        adapter = saving.read_adapter(directory, model, revision=revision, token=token)
        reft_model = cls(adapter.config, model)
        saving.load_trained(reft_model, adapter)
        reft_model.set_device(None)
        return reft_model.eval()

    @classmethod
    def load(
        cls,
        load_directory: str | Path,
        model: PreTrainedModel,
        from_huggingface_hub: bool = False,  # noqa: ARG003  # the name shows it
    ) -> Self:
        """pyreft's name and order of arguments for `from_pretrained`."""
        return cls.from_pretrained(model, load_directory)

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
        adapter = saving.read_adapter(directory, self.model, revision=revision, token=token)
        self.adapters.put(adapter_name, freeze(adapter, self.model))

    def set_adapter(self, choice: AdapterChoice) -> None:
        """Choose what acts in calls that do not choose; values as in their `adapter_names`."""
        self.adapters.activate(choice)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a loaded adapter that is not the active one."""
        self.adapters.delete(adapter_name)
