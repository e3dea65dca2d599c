"""The table of names: what is known, what is refused, and how a definition that is run again is told from a rival."""

import pytest

from peft_residual.registry import INITIALIZATIONS, REPARAMETERIZATIONS, Registry


@pytest.fixture
def registry():
    return Registry("some_field", "register_something")


def first(config):
    return "first"


def second(config):
    return "second"


def test_the_built_in_names_are_there_in_the_order_of_the_documentation():
    networks = ["MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE"]
    assert REPARAMETERIZATIONS.names() == networks
    ways = ("RANDOM", "SAMPLE_VOCAB", "COMMON_VOCAB", "TEXT", "CLASS_LABELS", "PROMPT")
    assert sorted(INITIALIZATIONS.names()) == sorted(ways)


def test_only_the_mlps_work_token_by_token():
    assert [n for n in REPARAMETERIZATIONS.names() if REPARAMETERIZATIONS[n].per_token] == ["MLP1", "MLP2"]


def test_a_builder_is_found_by_its_name_and_stays_a_plain_function(registry):
    assert registry.add("A", per_token=True, unused_fields=("x",))(first) is first
    entry = registry["A"]
    assert (entry.builder, entry.per_token, entry.unused_fields) == (first, True, ("x",))


def test_a_taken_name_is_refused_with_the_owner_named(registry):
    registry.add("A")(first)
    with pytest.raises(ValueError, match=r"some_field='A' is already registered by .*test_registry\.first"):
        registry.add("A")(second)
    assert registry["A"].builder is first


def test_the_same_definition_run_again_replaces_itself(registry):
    def define():
        def builder(config):
            return None

        return builder

    old, new = define(), define()
    registry.add("A")(old)
    registry.add("A")(new)
    assert registry["A"].builder is new and registry.names() == ["A"]


@pytest.mark.parametrize("name", ("", None, 3, ("A",)))
def test_a_name_that_is_no_word_is_refused(registry, name):
    with pytest.raises(ValueError, match="`name` must be a non-empty string, got "):
        registry.add(name)


@pytest.mark.parametrize("name", ("B", "a", None, ["A"], {}))
def test_an_unknown_name_is_refused_with_the_known_ones_and_the_remedy(registry, name):
    registry.add("A")(first)
    with pytest.raises(ValueError) as error:
        registry[name]
    words = (f"some_field={name!r}", "'A'", "peft_residual.register_something")
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("builder", (lambda config: 1, type("Builder", (), {"__call__": lambda self, config: 1})()))
def test_any_callable_is_a_builder(registry, builder):
    registry.add("A")(builder)
    assert registry["A"].builder(None) == 1
