"""Fields and arguments of pyvene's configs."""

import re
from typing import Any

import pytest
import pyvene as pv

import reftnoise as rn
from support.models.pyreft_units import SIZES, base

PLACE: dict[str, Any] = {"layer": 1, "component": "block_output"}


def loreft(**changes: Any) -> rn.LoreftIntervention:
    return rn.LoreftIntervention(**SIZES | changes)


@pytest.mark.parametrize(
    "field",
    [
        {"group_key": 0},
        {"intervention_link_key": 0},
        {"subspace_partition": None},
        {"subspace_partition": [[0, 2], [2, 4]]},
        {"latent_dim": None},
        {"source_representation": None},
        {"hidden_source_representation": None},
        {"moe_key": None},
        {"unit": "pos"},
        {"max_number_of_units": 5},
    ],
    ids=str,
)
def test_a_field_without_effect(field: dict[str, Any]) -> None:
    config = rn.ReftConfig(PLACE | {"intervention": loreft()} | field)
    assert config.to_dict() == rn.ReftConfig(PLACE | {"intervention": loreft()}).to_dict()


def test_the_rank_of_a_module_holds() -> None:
    with pytest.warns(UserWarning, match="low_rank_dimension 2 with a ready Lor.* of rank 4"):
        config = rn.ReftConfig(PLACE | {"intervention": loreft(), "low_rank_dimension": 2})
    assert config.to_dict()["representations"][0]["low_rank_dimension"] == 4
    (unit,) = rn.get_reft_model(base(), config).interventions.values()
    assert unit.low_rank_dimension == 4


def test_arguments_of_pyvenes_config() -> None:
    config = rn.ReftConfig(
        representations={**PLACE, "intervention": loreft()},
        intervention_types=rn.LoreftIntervention,
        mode="parallel",
        sorted_keys=None,
        model_type=None,
    )
    assert config == rn.ReftConfig(config.representations)


@pytest.mark.parametrize("types", [rn.NoreftIntervention, [rn.NoreftIntervention]])
def test_types_are_of_entries_that_name_none(types: Any) -> None:
    entry = PLACE | {"low_rank_dimension": 4}
    config = rn.ReftConfig([entry], intervention_types=types)
    assert config == rn.ReftConfig(entry | {"intervention": "noreft"})
    entry |= {"intervention": "loreft"}
    assert rn.ReftConfig([entry], intervention_types=types) == rn.ReftConfig(entry)


def test_entries_may_be_pyvenes_tuples() -> None:
    unit = loreft()
    entry = pv.RepresentationConfig(layer=1, component="block_output", intervention=unit)
    expected = rn.ReftConfig(PLACE | {"intervention": unit})
    assert rn.ReftConfig(entry) == rn.ReftConfig([entry]) == expected


@pytest.mark.parametrize(
    ("entries", "arguments", "message"),
    [
        (PLACE, {"mode": "serial"}, "mode 'serial': expected 'parallel', as units read one input"),
        ([PLACE], {"intervention_types": []}, "intervention_types: expected 1, one for each entry"),
        (
            [PLACE | {"intervention": "loreft", "intervention_link_key": 0}] * 2,
            {},
            "representations[1]: intervention_link_key 0 is that of representations[0], too",
        ),
    ],
)
def test_what_is_not_supported(entries: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        rn.ReftConfig(entries, **arguments)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="ReftConfig got an unknown argument 'modules'"):
        rn.ReftConfig(PLACE | {"intervention": loreft()}, modules=1)  # type: ignore[call-arg]  # the mistake
