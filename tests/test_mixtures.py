"""Types by name of mixture: llama.cpp's own, tensor by tensor, and what a person asks for beyond them."""

import json
import sys
from pathlib import Path

import pytest
from peer import PYTHON, needs_llama_cpp

from gemma4q import Gemma4qError
from gemma4q.abi import TensorType as T
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.types import ValueType
from gemma4q.model.config import read_config
from gemma4q.quantize.mixtures import ALIASES, INSTEAD, MIXTURES, Traits, fitting, mixture, types
from gemma4q.quantize.overrides import Overrides, changed, pattern, pattern_file, setting, tensor_type
from gemma4q.shipped import shipped

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import mixtures_oracle as oracle
import shapes

ANSWERS = json.loads((Path(__file__).parent / "data/mixtures.json").read_text())
# llama_model_quantize_params' name of an option: ours, and how its value is read.
OPTIONS = {
    "pure": ("pure", bool),
    "token_embedding_type": ("embedding", T),
    "output_tensor_type": ("output", T),
    "quantize_output_tensor": ("leave_output", lambda kept: not kept),
}


def given(model: str, name: str, importance: bool = False, overrides: Overrides = Overrides()) -> dict[str, str]:
    tensors = oracle.source(model)
    traits = shapes.traits(oracle.MODELS[model])
    return oracle.in_short(tensors, types(tensors, traits, MIXTURES[name], overrides, importance))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("model", oracle.MODELS)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(model, name):
    plain = ANSWERS["mixtures"][model][name]
    assert given(model, name) == plain
    assert given(model, name, importance=True) == ANSWERS["with importance"][model].get(name, plain)


@pytest.mark.parametrize("name", oracle.OVERRIDES)
def test_what_is_asked_for_beyond_a_mixture_is_given_as_llama_cpp_gives_it(name):
    asked = oracle.OVERRIDES[name]
    options = {OPTIONS[key][0]: OPTIONS[key][1](value) for key, value in asked.options.items()}
    patterns = tuple(pattern("=".join(pair)) for pair in asked.patterns)
    found = given(asked.model, asked.mixture, overrides=Overrides(**options, patterns=patterns))
    assert found == ANSWERS["overrides"][name]


@pytest.mark.peers
def test_the_answers_are_what_llama_cpp_says_today():
    needs_llama_cpp()
    assert oracle.answers(PYTHON) == ANSWERS


def test_importance_changes_the_first_layers_of_some_mixtures_only():
    assert {name for models in ANSWERS["with importance"].values() for name in models} == {
        "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"
    }  # fmt: skip


def test_26b_falls_back_where_rows_are_no_multiple_of_256():
    assert given("26b", "Q4_K_S")["Q5_1 3, Q5_0 27"] == "ffn_down ffn_down_exps"
    assert [fitting(type, 704) for type in (T.Q2_K, T.Q3_K, T.IQ4_XS, T.Q4_K, T.Q5_K, T.Q6_K, T.Q4_0, T.BF16)] == [
        T.Q4_0, T.Q4_0, T.IQ4_NL, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_0, T.BF16
    ]  # fmt: skip
    assert [fitting(type, 48) for type in (T.Q4_K, T.Q8_0, T.F32)] == [T.F16, T.F16, T.F32]


def test_the_shipped_models_traits_are_read_from_their_keys():
    read = [Traits.of(read_config(open_gguf(shipped(name)))) for name in ("tiny", "tiny-moe")]
    assert read == [Traits(4, True, 0), Traits(4, True, 8)]


def test_names_are_llama_cpps_in_any_case():
    assert mixture("q4_k_m") is mixture("Q4_K") is MIXTURES["Q4_K_M"]
    assert [mixture(alias).name for alias in ALIASES] == list(ALIASES.values())
    numbers = [m.file_type for m in MIXTURES.values() if m.file_type is not None]
    assert len(set(numbers)) == len(numbers) == len(MIXTURES) - 1


def refused(function, *arguments) -> str:
    with pytest.raises(Gemma4qError) as caught:
        function(*arguments)
    return str(caught.value)


def test_types_that_are_not_written_are_refused_with_what_comes_nearest():
    assert refused(mixture, "iq3_m") == (
        "bad_quant_type: IQ3_M: gemma4q neither reads nor writes its blocks; Q3_K_M comes nearest"
    )
    for name in INSTEAD:
        assert "comes nearest" in refused(mixture, name)
    assert refused(mixture, "Q4_K_XL").startswith("bad_quant_type: 'Q4_K_XL' is no type: choose Q2_K, ")
    assert refused(tensor_type, "IQ2_S").startswith("bad_quant_type: IQ2_S: gemma4q does not write this type: ")
    assert refused(tensor_type, "Q9").startswith("bad_quant_type: Q9: there is no such type")
    assert refused(tensor_type, "count").startswith("bad_quant_type: ")


def test_patterns_are_found_anywhere_in_any_case_and_the_first_wins():
    overrides = Overrides(patterns=(pattern(r"BLK\.\d\.attn_v=q8_0"), pattern("attn=Q5_K"), pattern("typo=q4_0")))
    assert overrides.named("blk.1.attn_v.weight") == T.Q8_0
    assert overrides.named("blk.11.attn_v.weight") == T.Q5_K
    assert overrides.named("blk.11.ffn_up.weight") is None
    assert overrides.idle(["blk.0.attn_v.weight"]) == ["typo"]
    assert pattern("a(?=b)=f32")[0].search("ab")


def test_a_slip_in_a_pattern_is_named(tmp_path):
    for text in ("attn_v", "=q8_0", "attn_v="):
        assert refused(pattern, text) == f"bad_option: '{text}' is not of the form REGEX=TYPE, as attn_v=q8_0"
    assert refused(pattern, "(=q8_0").startswith("bad_option: '(' is no regular expression: ")
    assert refused(pattern, "attn_v=q9").startswith("bad_quant_type: q9: there is no such type")
    assert refused(pattern_file, tmp_path / "none").startswith("not_readable: ")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert refused(pattern_file, tmp_path / "bytes").endswith("bytes: it is no text")
    (tmp_path / "two").write_text("attn_v=q8_0\n  ffn_down=q6_k\tattn_k=f16")
    assert [type for _, type in pattern_file(tmp_path / "two")] == [T.Q8_0, T.Q6_K, T.F16]


def test_settings_are_spelt_as_llama_cpp_spells_them():
    assert setting("general.name=str:My = model") == ("general.name", "My = model")
    assert setting("gemma4.context_length=int:8192") == ("gemma4.context_length", 8192)
    assert setting("a=float:1e-6") == ("a", 1e-6) and setting("a=bool:true") == ("a", True)
    for text in ("a", "a=1", "a=double:1", "=int:1", "a b=int:1"):
        assert refused(setting, text).startswith(f"bad_option: '{text}' is not of the form KEY=TYPE:VALUE")
    assert refused(setting, "a=int:1.5") == "bad_option: a: '1.5' is no int"
    assert refused(setting, "a=bool:yes") == "bad_option: a: 'yes' is no bool"
    assert refused(setting, "split.count=int:3").startswith("bad_option: split.count describes the file")


def test_a_setting_keeps_the_width_of_an_integer_and_must_fit_it():
    keys, kinds = {"a": 1, "b": 2, "c": "x"}, {"a": (ValueType.I32,), "b": (ValueType.U64,), "c": (ValueType.STRING,)}
    values, after = changed(keys, kinds, [("a", -7), ("b", 1 << 40), ("c", True), ("d", 3), ("e", 0.5)])
    assert values == {"a": -7, "b": 1 << 40, "c": True, "d": 3, "e": 0.5}
    assert [after[key][0].name for key in values] == ["I32", "U64", "BOOL", "U32", "F32"]
    assert keys["a"] == 1
    assert refused(changed, keys, kinds, [("d", -1)]) == "bad_option: d: -1 is not in 0 .. 4294967295, which U32 holds"
    assert refused(changed, keys, kinds, [("a", 1 << 31)]).startswith("bad_option: a: 2147483648 is not in -2147483648")
    for value in (float("nan"), float("inf"), 1e39):
        assert refused(changed, keys, kinds, [("d", value)]).endswith("is no number that F32 holds")
