"""`ResidualAdapters`: a model's adapters, residual and plain: built, made active, frozen, deleted and saved."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..config import ResidualPromptTuningConfig
from ..config_checks import check_width
from ..encoder import ResidualPromptEncoder
from ..storage import atomic, model_card
from ..storage.sharded import gathered_state, is_sharded
from .base_model import special_ids
from .learning_rate import watch_learning_rate


# Methods that PEFT passes on to the base model, where they mean something else with a prompt, and what to use instead.
_UNLOADING = (
    "a prompt is not part of the base model's weights. Use `peft_residual.save_as_prompt_tuning` for a plain prompt, "
    "`peft_residual.save_as_vocabulary` for an ordinary checkpoint with new tokens, or `model.get_base_model()` for "
    "the model without the prompt."
)
_WITHOUT_PROMPT = (
    "it would run the base model without the prompt. Use `model.generate` or `model.forward`, or "
    "`with model.disable_adapter():` to run the base model."
)
_REFUSED = {
    **dict.fromkeys(("merge_and_unload", "unload"), _UNLOADING),
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager", "get_encoder"),
        _WITHOUT_PROMPT,
    ),
}


class ResidualAdapters(PeftModel):
    """PEFT's management of adapters, with what it lacks for residual ones.

    **Attributes**:
        - **merged_from** (`dict[str, ResidualPromptTuningConfig]`) -- The former config of each adapter that was
          merged by [`convert_to_prompt_tuning`], for the model card.
    """

    # Attributes of PEFT's, which it does not annotate
    base_model: Any
    peft_config: dict[str, Any]
    prompt_encoder: Any
    word_embeddings: Any
    merged_from: dict[str, ResidualPromptTuningConfig]
    _adapters_disabled: bool  # PEFT's own flag

    def active_residual_config(self) -> ResidualPromptTuningConfig | None:
        """The active adapter's config if it is a residual one, else None."""
        name = self.active_adapter
        return self._residual_config(name) if isinstance(name, str) else None

    def _residual_config(self, adapter_name: str) -> ResidualPromptTuningConfig | None:
        config = self.peft_config.get(adapter_name)
        return config if isinstance(config, ResidualPromptTuningConfig) else None

    def __getattr__(self, name: str) -> Any:
        """PEFT takes attributes that it does not know from the base model; not those that a prompt changes."""
        reason = _REFUSED.get(name)
        if reason is None or (reason == _WITHOUT_PROMPT and self._adapters_disabled):
            return super().__getattr__(name)
        raise AttributeError(f"`{name}` is not available with a prompt: {reason}")

    # --- build ----------------------------------------------------------------------------------------------------

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """Build the encoder of a new adapter."""
        config = self._residual_config(adapter_name)
        if config is None:
            super()._setup_prompt_encoder(adapter_name)
            self._find_word_embeddings()
        else:
            # PEFT freezes the base model, finds its word embeddings and makes a plain prompt, which is replaced.
            self.peft_config[adapter_name] = config.to_prompt_tuning_config(inference_mode=True)
            try:
                with torch.random.fork_rng(devices=[]):
                    super()._setup_prompt_encoder(adapter_name)
            finally:
                self.peft_config[adapter_name] = config
            del self.prompt_encoder[adapter_name]
            self._find_word_embeddings()
            encoder = ResidualPromptEncoder(config, self.word_embeddings, special_ids(self.base_model))
            self.prompt_encoder[adapter_name] = encoder.to(self.device)

    def _find_word_embeddings(self) -> None:
        # PEFT takes a weight with `vocab_size` rows, which may be another one, or not be there.
        found = self._modules.pop("word_embeddings", None) or self.__dict__.get("word_embeddings")
        own = self.base_model.get_input_embeddings() if hasattr(self.base_model, "get_input_embeddings") else None
        if own is not None and getattr(found, "weight", None) is not own.weight:
            found = own
        # A plain attribute: PEFT registers the table twice, and FSDP2 cannot load a checkpoint that has both names.
        self.__dict__["word_embeddings"] = found

    def install_encoder(
        self, adapter_name: str, config: ResidualPromptTuningConfig, encoder: ResidualPromptEncoder
    ) -> None:
        """Replace a plain prompt, which PEFT has loaded, by the residual encoder that it was saved with.

        Raises:
            ValueError: If the encoder has another width than the model.
        """
        plain = self.peft_config[adapter_name]
        self._find_word_embeddings()
        check_width(encoder.config, self.word_embeddings)
        for name in ("token_dim", "num_layers", "num_attention_heads", "modules_to_save"):
            setattr(config, name, getattr(plain, name))  # PEFT has filled them in
        config.inference_mode = True
        encoder.config = config
        device = self.prompt_encoder[adapter_name].embedding.weight.device
        self.prompt_encoder[adapter_name] = encoder if device.type == "cpu" else encoder.to(device)
        self.peft_config[adapter_name] = config

    # --- active, trainable ----------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter active. It becomes trainable unless it was loaded for inference; the others are frozen."""
        config = self._residual_config(adapter_name)
        if config is not None:
            inference_mode = inference_mode or config.inference_mode
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.freeze_inactive_prompts()
        if config is not None:
            self.set_requires_grad(adapter_name, not inference_mode)

    def freeze_inactive_prompts(self) -> None:
        """Freeze residual prompts that are not active, so that they do not count as trainable."""
        for name in self.peft_config:
            if self._residual_config(name) is not None and name != self.active_adapter:
                self.prompt_encoder[name].requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze the prompt and network of the given residual adapters."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        others = [name for name in names if self._residual_config(name) is None]
        if others:
            super().set_requires_grad(others, requires_grad=requires_grad)
        for name in set(names) - set(others):
            self.prompt_encoder[name].requires_grad_(requires_grad)
            if requires_grad:
                watch_learning_rate(self.prompt_encoder[name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, PEFT makes the first of the remaining ones active."""
        was_active = adapter_name == self.active_adapter
        super().delete_adapter(adapter_name)
        self.merged_from.pop(adapter_name, None)
        if was_active and self.active_residual_config() is not None:
            self.set_adapter(self.active_adapter)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the frozen base model without prompt and with its own heads, in `forward` and in `generate`."""
        if self.active_residual_config() is None:
            with super().disable_adapter():
                yield
            return
        wrappers = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        gradients = [(p, p.requires_grad) for wrapper in wrappers for p in wrapper.parameters()]
        was_disabled = self._adapters_disabled
        try:
            self._adapters_disabled = True
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            self._adapters_disabled = was_disabled
            if not was_disabled:
                for wrapper in wrappers:
                    wrapper.enable_adapters(True)
            for parameter, requires_grad in gradients:
                parameter.requires_grad = requires_grad

    # --- save -----------------------------------------------------------------------------------------------------

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The projected prompt as it is saved: `[P, H]`, float32, on the CPU, without dropout."""
        if self._residual_config(adapter_name) is None:
            return super().get_prompt_embedding_to_save(adapter_name)
        encoder = self.prompt_encoder[adapter_name]
        return encoder.project_saved(gathered_state(encoder))

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters as PEFT does. A kill at any moment leaves no incomplete adapter.

        If FSDP2 or ZeRO-3 shards the weights and no `state_dict` is given, every process must call this;
        `is_main_process` says which one writes. Residual adapters are always saved as safetensors: with
        `safe_serialization=False` there is a warning.

        Raises:
            ValueError: If `save_directory` is a file.
            RuntimeError: If the weights are sharded and not every process calls.
        """
        names = selected_adapters or self.peft_config
        residual = [name for name in names if self._residual_config(name) is not None]
        if residual and not safe_serialization:
            warnings.warn(
                f"`safe_serialization=False` is ignored: the adapters {residual} are saved as safetensors, since "
                "pickles can run code and are not loaded.",
                stacklevel=2,
            )
            safe_serialization = True
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory`={str(save_directory)!r} is a file. Name a folder.")
        trained = [
            (n, m) for n, m in self.named_modules() if n == "prompt_encoder" or isinstance(m, AuxiliaryTrainingWrapper)
        ]
        if residual and kwargs.get("state_dict") is None and any(is_sharded(module) for _, module in trained):
            kwargs["state_dict"] = {k: t for name, module in trained for k, t in gathered_state(module, name).items()}
        if selected_adapters is None and kwargs.get("state_dict"):
            selected_adapters = self._adapters_in(kwargs["state_dict"])
        kwargs["path_initial_model_for_weight_conversion"] = path_initial_model_for_weight_conversion
        args = (safe_serialization, selected_adapters, save_embedding_layers, is_main_process)
        if not is_main_process:  # writes nothing, but takes part in gathering
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        with atomic.new_adapters(save_directory) as folder:
            super().save_pretrained(str(folder), *args, **kwargs)
            old_card = os.path.join(save_directory, model_card.CARD_NAME)
            if os.path.isfile(old_card):
                shutil.copy(old_card, folder)
            self.create_or_update_model_card(str(folder))

    def _adapters_in(self, state_dict: dict[str, Tensor]) -> list[str]:
        """All adapters except frozen residual ones that the state dict lacks: the Trainer's has none with ZeRO-3."""
        missing = [
            name
            for name in self.peft_config
            if self._residual_config(name) is not None
            and not self.prompt_encoder[name].is_trainable
            and not any(key.startswith(f"prompt_encoder.{name}.") for key in state_dict)
        ]
        if missing:
            warnings.warn(
                f"`state_dict` has no weights of the frozen adapter(s) {missing}; they are not saved.", stacklevel=3
            )
        return [name for name in self.peft_config if name not in missing]

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the adapters in a folder, as [`update_card`] does, without results.

        PEFT calls this before it writes adapters, when there is nothing to describe yet, and the Trainer after it has
        written its own card. A card with damaged metadata is left as it is, with a warning: losing the trained
        adapter because of it would be worse.
        """
        subfolders = [name for name in self.peft_config if name != "default"]
        if not any(os.path.isfile(os.path.join(output_dir, name, CONFIG_NAME)) for name in ("", *subfolders)):
            return
        merged_from = self.merged_from.get("default")
        trained_as = merged_from.to_dict() if merged_from is not None else None
        tags = getattr(self.get_base_model(), "model_tags", None) or ()
        try:
            model_card.update_card(output_dir, subfolders=subfolders, results={}, trained_as=trained_as, tags=tags)
        except ValueError as error:
            warnings.warn(f"The model card was not updated. {error}", stacklevel=3)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Update the card once more: transformers' `push_to_hub` replaces it by the Hub's or by a form."""
        self.create_or_update_model_card(str(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
