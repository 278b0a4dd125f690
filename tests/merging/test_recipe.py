from pathlib import Path

import pytest

from megamod.errors import UserError
from megamod.merging.methods import METHODS
from megamod.merging.recipe import depths, read_recipe, values_for, weighted

HEAD = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "merge.yml"
    path.write_text(text)
    return path


def weights_of(recipe, names: list[str]) -> dict[str, list[float]]:
    depth, method = depths(names), METHODS[recipe.method]
    return {n: [v["weight"] for v in values_for(recipe, method, n, depth[n])[1]] for n in names}


def test_depth_is_the_layers_place_among_the_layers():
    names = ["embed", "h.0.mlp.0.w", "h.2.x", "h.4.x", "norm"]
    assert depths(names) == {"embed": 0, "h.0.mlp.0.w": 0, "h.2.x": 0.5, "h.4.x": 1, "norm": 0}
    assert depths(["embed", "h.0.x"]) == {"embed": 0, "h.0.x": 1}


def test_numbers_lists_and_filters(tmp_path):
    text = """
merge_method: linear
models:
- model: a
  parameters: {weight: [0, 1, 10]}
- model: b
  parameters:
    weight:
    - {filter: mlp, value: [2, 4]}
    - {filter: attn, value: 1e-3}
- model: c
parameters:
  weight: [{filter: "*", value: 7}]
  normalize: false
  int8_mask: true
dtype: float32
"""
    recipe = read_recipe(write(tmp_path, text))
    assert (recipe.dtype, recipe.out_dtype, recipe.base, recipe.tokenizer) == (
        "float32",
        None,
        0,
        0,
    )
    assert weights_of(recipe, ["wte", "h.0.mlp", "h.1.mlp", "h.3.mlp", "h.4.attn"]) == {
        "wte": [0, 7, 7],
        "h.0.mlp": [0, 2, 7],
        "h.1.mlp": [0.5, 2.5, 7],
        "h.3.mlp": [5.5, 3.5, 7],
        "h.4.attn": [10, 1e-3, 7],
    }
    assert values_for(recipe, METHODS["linear"], "x", 0)[0] == {"normalize": False}


def test_base_and_tokenizer_are_found_among_the_models(tmp_path):
    (tmp_path / "b").mkdir()
    text = HEAD + "- {model: b, member: law, parameters: {weight: 2}}\nbase_model: b\n"
    recipe = read_recipe(write(tmp_path, text + "tokenizer_source: a\nout_dtype: bfloat16"))
    assert [one.path for one in recipe.inputs] == [Path("a"), tmp_path / "b"]
    assert (recipe.base, recipe.tokenizer, recipe.inputs[1].member) == (1, 0, "law")
    assert read_recipe(write(tmp_path, text + "tokenizer_source: base")).tokenizer == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "merge.yml, line 1"),
        ("- a", "not a list of `key: value` lines"),
        (HEAD + "dtyp: float32", "'dtyp'; the nearest is 'dtype'"),
        (HEAD + "dtype: float33", "'float33' is not one of float32"),
        (HEAD + "slices: []", "'slices' is not read here"),
        (HEAD + "tokenizer_source: union", "tokenizer_source is 'union'"),
        (HEAD + "base_model: z", "base_model is 'z', which is none of the models a"),
        (HEAD + "chat_template: x", "chat_template is 'x'"),
        (HEAD + "parameters: 3", "parameters: is 3"),
        ("merge_method: linear\nmodels: []", "'models' is not a list of models"),
        ("merge_method: linear\nmodels: [a]", r"models[0]: is 'a'; give `model: FOLDER`"),
        ("merge_method: linear\nmodels: [{model: a, wieght: 2}]", "'wieght'"),
        ("merge_method: linear\nmodels: [{model: a, member: 3}]", "member: 3"),
        ("models: [{model: a}]", "merge_method is None"),
        ("", "not a list of `key: value` lines"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        read_recipe(write(tmp_path, text))
    assert told in str(error.value) and "merge.yml" in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ("{weight: x}", "weight: 'x' is not a finite number"),
        ("{weight: .nan}", "weight: nan is not a finite number"),
        ("{weight: true}", "weight: True is not a number"),
        ("{weight: []}", "weight: [] is not a finite number"),
        ("{weight: [1, a]}", "'a' is not a finite number"),
        ("{weight: [{filter: mlp, value: 1}]}", "weight is missing for attn.w"),
        ("{weight: [{filtr: mlp, value: 1}]}", "is not of the form"),
        ("{normalize: true}", "weight is missing for attn.w"),
        ("{weight: 1, normalize: 2}", "normalize: 2.0 is not true or false"),
        ("{weight: 1e31}", "weight: '1e31' is not a finite number"),
        ("{weight: &a {value: *a}}", "is not a finite number"),
        ("{weight: [{value: 1}, {filter: 2020-01-01, value: 1}]}", "is not of the form"),
        ("{weight: 1, int8_mask: 2020-01-01}", "is not true or false"),
        ("{weight: 1, densty: 1}", "linear has no parameter 'densty'"),
    ],
)
def test_parameters_that_are_wrong(tmp_path, parameters, told):
    text = f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {parameters}\n"
    recipe = read_recipe(write(tmp_path, text))
    with pytest.raises(UserError) as error:
        values_for(recipe, METHODS["linear"], "attn.w", 0)
    assert told in str(error.value) and "merge.yml" in str(error.value)


def test_as_many_weights_as_models():
    with pytest.raises(UserError, match="--weights: gives 3 weights, but there are 2 models"):
        weighted([(Path("a"), None), (Path("b"), "law")], [1, 2, 3])
    with pytest.raises(UserError, match="no model"):
        weighted([], [])
