"""How the parts of a block differ: closed forms, and the figures of each arm."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_routing.analysis.distances import compare_routers
from semantic_routing.analysis.page import write_page
from semantic_routing.analysis.parts import head_divergence, part_figures
from semantic_routing.analysis.profiles import routing_figures
from semantic_routing.analysis.statistics import js_divergence
from semantic_routing.analysis.weights import weight_figures
from tests.helpers.networks import tiny_config, tiny_network


def test_divergence_of_heads_is_0_for_equal_and_log2_of_their_number_for_disjoint_ones() -> None:
    equal = np.broadcast_to([0.2, 0.3, 0.5, 0.0], (2, 4, 4))
    assert head_divergence(equal) == pytest.approx([0, 0], abs=1e-12)
    assert head_divergence(np.eye(4)[None]) == pytest.approx([2])
    p, q = np.random.default_rng(0).dirichlet(np.ones(5), 2)
    assert head_divergence(np.stack([p, q])[None]) == pytest.approx([float(js_divergence(p, q))])


def test_keys_and_values_are_told_apart() -> None:
    """Keys read the first layer and values the last: centres 0 and 1, divergence 1 bit; heads agree."""
    cfg = tiny_config("depth-heads-kv", kv_heads=2)
    weights = np.zeros((3, 2, 2, 3))
    weights[:, 0, :, 0] = weights[:, 1, :, 2] = 1
    centre, divergence = part_figures(weights.reshape(12, 3), cfg)
    assert centre.columns == ["keys", "values"]
    assert centre.values == pytest.approx(np.tile([0, 1], (3, 1)))
    assert divergence.columns == ["keys from values", "heads, keys", "heads, values"]
    assert divergence.values == pytest.approx(np.tile([1, 0, 0], (3, 1)))


@pytest.mark.parametrize(
    ("arm", "columns"),
    [
        ("depth-kv", ["keys from values"]),
        ("depth-heads", ["heads, keys and values"]),
        ("depth-heads-kv", ["keys from values", "heads, keys", "heads, values"]),
    ],
)
def test_figures_have_the_rows_of_the_arm(arm: str, columns: list[str]) -> None:
    model = tiny_network(arm, std=1.0, kv_heads=2)
    drawn = {figure.name: figure for figure in routing_figures(model)}
    names = ["similarity-parts", "trend-parts", "effective-layers-parts", "centre-parts", "divergence-parts"]
    assert list(drawn) == names
    assert drawn["similarity-parts"].values.shape == (model.cfg.mixes, model.cfg.mixes)
    assert drawn["divergence-parts"].columns == columns
    assert drawn["divergence-parts"].values.min() > 0
    assert drawn["trend-parts"].rows[1] == {"depth-kv": "0, values"}.get(arm, model.cfg.rows[1].removeprefix("block "))


def test_a_page_names_the_rows(tmp_path) -> None:
    model = tiny_network("depth-kv", std=1.0)
    page = write_page(tmp_path / "index.html", "x", model, list(weight_figures(model)), [], []).read_text()
    assert '"rows": ["block 0, keys", "block 0, values"' in page
    assert '"names": ["0, keys", "0, values"' in page


def test_models_of_other_parts_are_not_compared() -> None:
    one, other = tiny_network("depth-kv", kv_heads=2), tiny_network("depth-heads", kv_heads=2)
    message = "b has 3 blocks of 2 parts reading 3 layers, a has 3 of 2 parts reading 3"
    with pytest.raises(ValueError, match=message):
        list(compare_routers(["a", "b"], [one, other]))
    assert len(list(compare_routers(["a", "b"], [one, tiny_network("depth-kv", kv_heads=2, seed=1)]))) == 2
