"""What the package uses of PEFT beyond its public API, checked at import and before any other module is imported."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any


REQUIREMENT = "peft>=0.21.2,<0.22"

# The methods that are wrapped, overridden or called, and the first parameters that each must take.
_METHODS = {
    "PeftModel": {
        "_setup_prompt_encoder": "adapter_name",
        "_split_kwargs": "kwargs",
        "_upload_modified_files": "working_dir",
        "add_adapter": "adapter_name peft_config",
        "create_or_update_model_card": "output_dir",
        "delete_adapter": "adapter_name",
        "disable_adapter": "",
        "from_pretrained": "model model_id adapter_name is_trainable config",
        "get_prompt": "batch_size task_ids max_cache_len",
        "get_prompt_embedding_to_save": "adapter_name",
        "load_adapter": "model_id adapter_name is_trainable",
        "save_pretrained": "save_directory safe_serialization selected_adapters save_embedding_layers is_main_process",
        "set_adapter": "adapter_name inference_mode",
        "set_requires_grad": "adapter_names requires_grad",
    },
    "BasePromptEncoder": {
        "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
        "_load_adapter_state_dict": "state_dict",
        "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
        "_remove_adapter_name_from_key": "key adapter_name",
    },
    "AuxiliaryTrainingWrapper": {"enable_adapters": "enabled"},
}


def check_peft() -> None:
    """Check that the installed PEFT has the methods and mappings that the package plugs into.

    Raises:
        ImportError: If one is missing or takes other arguments: names it, the version found and the version needed.
    """
    import peft
    from peft import mapping
    from peft.tuners import tuners_utils
    from peft.utils import other

    classes: dict[str, Any] = {
        "PeftModel": getattr(peft, "PeftModel", None),
        "BasePromptEncoder": getattr(tuners_utils, "BasePromptEncoder", None),
        "AuxiliaryTrainingWrapper": getattr(other, "AuxiliaryTrainingWrapper", None),
    }
    problems = []
    for owner, methods in _METHODS.items():
        for name, parameters in methods.items():
            method = getattr(classes[owner], name, None)
            if method is None:
                problems.append(f"{owner}.{name} is missing")
            elif not _takes(method, parameters.split()):
                problems.append(f"{owner}.{name} does not take ({', '.join(parameters.split())})")
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"):
        if peft.PeftType.PROMPT_TUNING not in getattr(mapping, name, {}):
            problems.append(f"{name}[PROMPT_TUNING] is missing")
    if problems:
        raise ImportError(
            f"peft_residual cannot plug into peft {version('peft')}: {'; '.join(problems)}. Install a version that "
            f"fits: pip install '{REQUIREMENT}'."
        )


def _takes(method: Any, parameters: list[str]) -> bool:
    found = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]
    return found[: len(parameters)] == parameters
