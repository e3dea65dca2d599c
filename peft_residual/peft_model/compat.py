"""What the package needs of PEFT, checked when it is imported and before anything else of it is."""

from __future__ import annotations

from importlib.metadata import version


REQUIREMENT = "peft>=0.21.2,<0.22"
_ENCODER_HOOKS = (
    "_get_adapter_state_dict",
    "_load_adapter_state_dict",
    "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key",
)
_MODEL_METHODS = ("from_pretrained", "load_adapter", "add_adapter", "get_prompt", "get_prompt_embedding_to_save")


def check_peft() -> None:
    """Check that the installed PEFT has the hooks that the package plugs into.

    Raises:
        ImportError: If one is missing: names it, the version found and the version needed.
    """
    import peft
    from peft import mapping
    from peft.tuners import tuners_utils

    encoder = getattr(tuners_utils, "BasePromptEncoder", None)
    missing = [f"BasePromptEncoder.{name}" for name in _ENCODER_HOOKS if not hasattr(encoder, name)]
    missing += [f"PeftModel.{name}" for name in _MODEL_METHODS if not hasattr(peft.PeftModel, name)]
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"):
        if peft.PeftType.PROMPT_TUNING not in getattr(mapping, name, {}):
            missing.append(f"{name}[PROMPT_TUNING]")
    if missing:
        raise ImportError(
            f"peft_residual cannot plug into peft {version('peft')}: it lacks {', '.join(missing)}. "
            f"Install a version that fits: pip install '{REQUIREMENT}'."
        )
