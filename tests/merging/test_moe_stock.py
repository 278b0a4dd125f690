"""Mixtures without this package: a stock class whose router selects one expert is that expert."""

import json
import os
import subprocess
import sys

import pytest
from merging.test_moe import ROWS, to_moe, tokens
from merging.test_moe_edit import anchored

from megamod.models.lm.moe_families import LAYERS, MOE_FAMILIES, MOE_OF_DENSE

EXPERTS = ("seed", "law", "med")
STOCK = [kind for kind in MOE_OF_DENSE if kind != "demix"]  # the project's own GPT
WITHOUT_MEGAMOD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

def load(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(report[key] for key in keys), (folder, report)
    return model.eval()

def select(expert, outputs):
    def forward(hidden):
        rows = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        parts = torch.zeros(rows, 3), torch.ones(rows, 1), torch.full((rows, 1), expert)
        values = dict(zip(outputs, parts))
        return tuple(values[position] for position in range(3))
    return forward

results = {}
for kind, case in json.load(sys.stdin).items():
    ids, sparse, differences = torch.tensor(case["ids"]), load(case["mixture"]), []
    with torch.no_grad():
        free = sparse(ids).logits
        for expert, folder in enumerate(case["experts"]):
            for layer in sparse.get_submodule(case["layers"]):
                router = layer.get_submodule(case["router"])
                router.forward = select(expert, case["outputs"])
            forced, dense = sparse(ids).logits, load(folder)(ids).logits
            differences.append([(forced - other).abs().max().item() for other in (dense, free)])
    results[kind] = type(sparse).__name__, type(sparse).__module__, differences
assert not any(name.partition(".")[0] == "megamod" for name in sys.modules)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, list]:
    """Class, its module, and the difference from each expert and from free routing, by family."""
    cases = {}
    for kind in STOCK:
        folder, family = tmp_path_factory.mktemp(kind), MOE_FAMILIES[MOE_OF_DENSE[kind]]
        anchored(folder, kind, **ROWS[kind][1])
        cases[kind] = {
            "mixture": str(to_moe(folder, *EXPERTS, topk=1, anchor=True)),
            "experts": [str(folder / name) for name in EXPERTS],
            "layers": LAYERS,
            "router": f"{family.module}.{family.router}",
            "outputs": family.outputs,
            "ids": tokens().tolist(),
        }
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT_MEGAMOD],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", STOCK)
def test_stock_class_with_one_expert_is_the_dense_model(differences, kind):
    name, module, experts = differences[kind]
    assert name == MOE_FAMILIES[MOE_OF_DENSE[kind]].architecture
    assert module.startswith("transformers.models.")
    assert len(experts) == len(EXPERTS)
    for from_dense, from_free_routing in experts:
        assert from_dense <= 1e-5 < from_free_routing
