"""`ResidualPromptEncoder`: the prompt embedding `E`, the network `φ`, and the projected prompt `E' = E + φ(E)`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Mapping
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from .config import ResidualPromptTuningConfig
from .config_checks import check_token_dim, check_width
from .initialization import initialize_prompt, random_sources
from .networks import build_network, build_network_to_load
from .storage import checkpoint
from .storage.sharded import gathered_state, gathered_tensors
from .word_embeddings import embedding_scale


_SKELETON_LOCK = threading.RLock()
_LIVE: WeakSet[ResidualPromptEncoder] = WeakSet()


class ResidualPromptEncoder(BasePromptEncoder):
    """Soft prompt trained through a network: `E' = E + φ(E)` (Razdaibiedina et al., 2023, section 3).

    With a unit `s` (`config.encoder_scale`, 1 in the paper) it is `E' = s·(e + φ(e))`, where `e = E / s` is trained.

    It is `model.prompt_encoder[adapter_name]`. `P` is the number of virtual tokens, `H` the width of the embeddings.
    While trainable, it computes the projected prompt at every call; when frozen, once, without dropout.

    Args:
        config ([`ResidualPromptTuningConfig`]): With `token_dim` filled in.
        word_embeddings (`torch.nn.Module`): The base model's word embeddings; read once, for the initialization.
        special_ids (`Collection[int]`): Special token ids of the base model, which no initialization may sample.

    **Attributes**:
        - **config** ([`ResidualPromptTuningConfig`]) -- The adapter's configuration.
        - **embedding** (`torch.nn.Embedding`) -- The prompt embedding in units of `s`: `embedding.weight` `[P, H]`,
          float32. For a network that mixes `M` rows of the vocabulary, their weights `[P, M]`.
        - **network** (`torch.nn.Module`) -- The network `φ`, float32.

    Raises:
        ValueError: If the config does not fit the model, or the prompt cannot be initialized.
    """

    _projected: Tensor | None

    def __init__(
        self, config: ResidualPromptTuningConfig, word_embeddings: nn.Module, special_ids: Collection[int] = ()
    ) -> None:
        check_token_dim(config)
        check_width(config, word_embeddings)
        if config.encoder_scale is None and not config.mixes_vocabulary:
            config.encoder_scale = embedding_scale(word_embeddings)
        with torch.device("cpu"):  # even if the user has set another default device: PEFT moves the encoder
            generator, network_seed = random_sources(config)
            network = build_network(config, network_seed)
            embedding = initialize_prompt(config, word_embeddings, generator, special_ids)
            if config.mixes_vocabulary:  # token i is initialized as row i, modulo the number of rows
                network.get_buffer("rows").copy_(embedding)
                mixed = torch.arange(config.total_virtual_tokens) % len(embedding)
                embedding = nn.functional.one_hot(mixed, len(embedding)).float()
            else:
                embedding = embedding / config.scale
        self._assemble(config, embedding, network)

    @classmethod
    def from_state(
        cls, config: ResidualPromptTuningConfig, state: Mapping[str, Tensor], projected: Tensor
    ) -> ResidualPromptEncoder:
        """Build the encoder of a saved adapter: frozen, in eval mode, on the CPU.

        Args:
            config ([`ResidualPromptTuningConfig`]): With `token_dim` filled in.
            state (`Mapping[str, torch.Tensor]`): `embedding.weight` and `network.*`; copied, as float32.
            projected (`torch.Tensor`): The projected prompt `[P, H]` that the adapter was saved with.

        Raises:
            ValueError: If the state does not fit the config, or does not result in `projected`.
        """
        check_token_dim(config)
        network = build_network_to_load(config, random_sources(config)[1])
        own = {checkpoint.NETWORK_PREFIX + name: tensor for name, tensor in network.state_dict().items()}
        is_meta = any(tensor.is_meta for tensor in own.values())
        own[checkpoint.EMBEDDING_KEY] = torch.empty(config.total_virtual_tokens, config.embedding_width, device="meta")
        checkpoint.check_leaves(own, state)
        # Copied: memory-mapped tensors may be unaligned, and torch then chooses kernels that round differently.
        state = {key: state[key].to("cpu", tensor.dtype, copy=True) for key, tensor in own.items()}
        weights = {key.removeprefix(checkpoint.NETWORK_PREFIX): tensor for key, tensor in state.items()}
        embedding = weights.pop(checkpoint.EMBEDDING_KEY)
        network.load_state_dict(weights, assign=is_meta)
        encoder = cls.__new__(cls)
        encoder._assemble(config, embedding, network)
        encoder.requires_grad_(False).eval()
        with torch.no_grad():
            checkpoint.check_projection(vars(config), projected, encoder.project())
        encoder._remember(projected.to("cpu", copy=True))
        encoder._skeleton.eval()  # built here, since torch.compile cannot do it
        return encoder

    def _assemble(self, config: ResidualPromptTuningConfig, embedding: Tensor, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.register_buffer("_projected", None, persistent=False)
        self._projected_key: tuple[tuple[int, int, int], ...] = ()
        self.requires_grad_()
        _LIVE.add(self)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Return the projected prompt.

        Args:
            indices (`torch.Tensor`, *optional*): Positions of virtual tokens, any shape, as PEFT passes them.

        Returns:
            `torch.Tensor`: `[P, H]`, or `[*indices.shape, H]`, float32 (the parameters' type if wider).
        """
        if self.is_trainable:
            self._projected = None  # an optimizer's writes may leave torch's version counters unchanged
            prompt = self.project()
        else:
            prompt = self.frozen_projection()
        return prompt if indices is None else prompt[indices]

    @property
    def prompt_embedding(self) -> Tensor:
        """The prompt embedding in the base model's units, `E = s·e`: `[P, H]`, comparable to its word embeddings."""
        return self.config.scale * self.embedding.weight

    @property
    def is_trainable(self) -> bool:
        """Whether any weight of the prompt or its network takes a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def project(self, dropout: bool = True) -> Tensor:
        """Compute `E' = E + φ(E)` from the live weights, with gradients: `[P, H]`, float32 or wider."""
        embedding, training = self.embedding.weight, self.network.training and dropout
        # Autocast off: training computes the prompt in the precision in which it is saved.
        with torch.autocast(embedding.device.type, enabled=False):
            if embedding.dtype not in (torch.float16, torch.bfloat16) and training == self.network.training:
                return _prompt_of(self.config, embedding, self.network(embedding))
            # Taken from their modules one by one: that is where ZeRO-3 notices that it must gather them.
            parameters = {name: self.network.get_parameter(name) for name, _ in self.network.named_parameters()}
            tensors = {**parameters, **dict(self.network.named_buffers())}
            return self._run(embedding, tensors, training)

    @torch.no_grad()
    def project_state(self, state: Mapping[str, Tensor]) -> Tensor:
        """Compute the projected prompt of a gathered state, on the CPU, in float32, in eval mode, autocast off.

        `state` has `embedding.weight` and `network.*`. Buffers that are not saved come from the live network.
        """
        tensors = {name: buffer.cpu() for name, buffer in self.network.named_buffers()}
        for key, tensor in state.items():
            if key.startswith(checkpoint.NETWORK_PREFIX):
                tensors[key.removeprefix(checkpoint.NETWORK_PREFIX)] = tensor.cpu()
        embedding = state[checkpoint.EMBEDDING_KEY].cpu()
        with torch.autocast("cpu", enabled=False):
            return self._run(embedding, tensors, training=False).clone()

    def _run(self, embedding: Tensor, tensors: Mapping[str, Tensor], training: bool) -> Tensor:
        """`E' = E + φ(E)` in float32, with these weights in the skeleton."""
        embedding = embedding.float()
        floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        # Other threads may run the skeleton too, with other weights. torch.compile does not know locks.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _SKELETON_LOCK:
            output = torch.func.functional_call(self._skeleton.train(training), floats, (embedding,), tie_weights=True)
        return _prompt_of(self.config, embedding, output)

    @functools.cached_property
    def _skeleton(self) -> nn.Module:
        """The network without weights and hooks of trainers; cached, so that it is no submodule."""
        return build_network_to_load(self.config, 0).to("meta")

    def frozen_projection(self) -> Tensor:
        """The projected prompt of frozen weights, without dropout: `[P, H]`, recomputed only if a weight changed."""
        if torch.compiler.is_compiling():  # a graph cannot ask whether a weight changed
            return self.project(dropout=False)
        projected = self._remembered()
        if projected is None:
            projected = self.project_state(gathered_state(self)).to(self.embedding.weight.device)
            self._remember(projected)
        return projected

    def _remembered(self) -> Tensor | None:
        return self._projected if self._projected_key == self._key() else None

    def _remember(self, projected: Tensor) -> None:
        self._projected = projected
        self._projected_key = self._key()

    def _key(self) -> tuple[tuple[int, int, int], ...]:
        # Identity and torch's count of in-place writes of each tensor
        tensors = [*self.parameters(), *self.network.buffers()]
        return tuple((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> ResidualPromptEncoder:
        """Move or cast; a cast drops the remembered projection, whose weights were rounded."""
        dtype = self.embedding.weight.dtype
        is_valid = self._remembered() is not None
        super()._apply(fn, recurse)
        self._projected_key = self._key() if is_valid and self.embedding.weight.dtype == dtype else ()
        return self

    # --- PEFT's hooks for saving and loading ----------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Keys of a residual adapter and of its heads do not contain the name, only parts that may equal it.
        return key

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: PeftModel,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        prefix = f"prompt_encoder.{adapter_name}."
        encoder: Any = model.prompt_encoder[adapter_name]
        network = [checkpoint.NETWORK_PREFIX + name for name in encoder._skeleton.state_dict()]
        names = [checkpoint.EMBEDDING_KEY, *network]
        state = gathered_tensors({name: state_dict[prefix + name] for name in names if prefix + name in state_dict})
        embedding = state.get(checkpoint.EMBEDDING_KEY)
        if embedding is None:
            raise ValueError(
                f"`state_dict` has no `{prefix}{checkpoint.EMBEDDING_KEY}`, so adapter {adapter_name!r} cannot be "
                "saved from it. Pass the state dict of the whole model, or none. With ZeRO-3 the Trainer has one if "
                "`stage3_gather_16bit_weights_on_model_save` (accelerate: `zero3_save_16bit_model`) is true."
            )
        if not embedding.numel():
            raise ValueError(
                f"`{prefix}{checkpoint.EMBEDDING_KEY}` is empty in `state_dict`: it is sharded (ZeRO-3). Call "
                "`model.save_pretrained` in every process, or pass `state_dict=accelerator.get_state_dict(engine)`."
            )
        return checkpoint.pack(encoder.project_saved(state), state)

    def project_saved(self, state: Mapping[str, Tensor]) -> Tensor:
        """The projected prompt of a gathered state, as it is saved: `[P, H]`, float32, on the CPU.

        A frozen adapter that was loaded keeps the projected prompt that it was loaded with, bit for bit.
        """
        recomputed = self.project_state(state)
        remembered = None if self.is_trainable else self._remembered()
        if remembered is not None:
            remembered = remembered.to("cpu", torch.float32, copy=True)
            if checkpoint.is_same_projection(remembered, recomputed):
                return remembered
        return recomputed

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: PeftModel,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check a checkpoint against this adapter, then name its tensors as the live model does."""
        encoder: Any = model.prompt_encoder[adapter_name]
        projected, state, heads = checkpoint.unpack(state_dict)
        if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
            raise ValueError(
                f"Adapter {adapter_name!r} is sharded by DeepSpeed ZeRO-3, and a file cannot be loaded into it. Load "
                "it before `deepspeed.initialize` or `accelerator.prepare`, or resume from DeepSpeed's own checkpoint "
                "(`Trainer.train(resume_from_checkpoint=...)`)."
            )
        own = encoder.state_dict()
        checkpoint.check_leaves(own, state)
        checkpoint.check_projection(vars(encoder.config), projected, encoder.project_state(state))
        live = {
            # Copied for the same reason as in `from_state`.
            f"prompt_encoder.{adapter_name}.{key}": tensor.to(own[key].device, copy=True)
            for key, tensor in state.items()
        }
        return {**heads, **live, checkpoint.PROJECTED_KEY: projected.to(own[checkpoint.EMBEDDING_KEY].device)}

    def _load_adapter_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        # The model's `load_state_dict` has set the weights by name. What is left is their projection.
        self._remember(state_dict[checkpoint.PROJECTED_KEY])


def is_in_use(config: ResidualPromptTuningConfig) -> bool:
    """Whether this very config object is that of a live encoder."""
    return any(encoder.config is config for encoder in list(_LIVE))


def _prompt_of(config: ResidualPromptTuningConfig, embedding: Tensor, output: Tensor) -> Tensor:
    return config.scale * (embedding + output if config.has_skip else output)
