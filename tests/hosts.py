"""What an older or newer PEFT or transformers cannot do itself, as reasons to skip a test."""

import contextlib
from importlib.metadata import version

import pytest

from peft_residual.compat import (
    GradientCheckpointingLayer,
    assists_from_embeddings,
    cache_name,
    generates_from_a_filled_cache,
)


TRANSFORMERS = tuple(int(part) for part in version("transformers").split(".")[:2])


def skip_before(oldest, what):
    """A mark for tests of something that transformers cannot do before a version."""
    return pytest.mark.skipif(
        oldest > TRANSFORMERS, reason=f"before transformers {'.'.join(map(str, oldest))}, {what}"
    )


@contextlib.contextmanager
def skip_where_transformers_fails():
    """Around what runs the base model without a prompt: where an older transformers fails, skip with its error."""
    try:
        yield
    except Exception as error:
        if TRANSFORMERS >= (5, 23):
            raise
        pytest.skip(f"transformers {version('transformers')} itself fails: {type(error).__name__}: {error}"[:150])


# GPT-2 and OPT return tuples there, and run without the prompt cache.
HAS_TUPLES = TRANSFORMERS < (4, 54)

needs_filled_caches = pytest.mark.skipif(
    not generates_from_a_filled_cache(), reason="transformers 5.0 to 5.2 ignores the length of a filled cache"
)
needs_assistance = pytest.mark.skipif(
    not assists_from_embeddings(), reason="this transformers cannot start assisted generation from embeddings"
)
needs_checkpointed_caches = pytest.mark.skipif(
    not hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache"),
    reason="this transformers cannot checkpoint a layer with a cache: every row runs the prompt",
)
# With what PEFT 0.21.2 itself generates the right tokens from plain prompts on transformers 5.24.
STOCK_GENERATION = {"use_cache": False} if cache_name() == "cache" else {}
