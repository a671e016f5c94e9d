"""Settings: read from variables and keywords, every other text refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_lora_patch import SettingsError, settings


def test_defaults_when_nothing_is_set():
    assert settings.read({}) == settings.Settings()
    assert settings.switched_on({}) is None
    assert settings.switched_on({"OPENPI_LORA": ""}) is None


def test_keywords_override_variables():
    environ = {"OPENPI_LORA_FREEZE": "jax", "OPENPI_LORA_DROPOUT": "0.25"}
    assert settings.read(environ).freeze == "jax"
    assert settings.read(environ, freeze="adapters", allow_untested=True) == settings.Settings(
        allow_untested=True, freeze="adapters", dropout=0.25
    )


@pytest.mark.parametrize("name", ["OPENPI_LORA_FREZE", "OPENPI_LORA_", "OPENPI_LORA_RANKS"])
def test_a_misspelt_variable_is_refused_by_name(name):
    with pytest.raises(SettingsError, match=name):
        settings.read({name: "1"})


@given(st.text())
def test_only_0_and_1_switch(text):
    expected = {"": None, "0": False, "1": True}
    if text in expected:
        assert settings.switched_on({"OPENPI_LORA": text}) is expected[text]
    else:
        with pytest.raises(SettingsError, match="OPENPI_LORA"):
            settings.switched_on({"OPENPI_LORA": text})


@given(st.sampled_from(["ALLOW_UNTESTED", "FREEZE", "DROPOUT"]), st.text())
def test_any_text_is_read_or_refused_with_the_variable_named(name, text):
    variable = f"OPENPI_LORA_{name}"
    try:
        found = settings.read({variable: text})
    except SettingsError as error:
        assert variable in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert found.freeze in settings.FREEZE_PRESETS
        assert 0.0 <= found.dropout < 1.0
