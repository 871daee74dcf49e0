"""Write docs/families.md: a card for each architecture that is built, from its description and from the tests.

Run from the repository: python -m tools.families. What a card says of a network is read from models/architecture.py,
and what it says was run from the tests that name the architecture, as in docs/support.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemo_disco.models.architecture import ARCHITECTURES, EMBEDDING, FINAL_NORM, OUTPUT, Architecture, Weight
from tools.support import COLUMNS, REAL_MODELS, ROOT, describe_column

PAGE = ROOT / "docs" / "families.md"
_WINDOWS = {
    "never": "none",
    "always": "in all layers, if `sliding_window` is set",
    "switch": "with `use_sliding_window`, in the layers that the config names",
    "unbuilt": "refused",
}
_ROLES = {
    "attention_norm": "before attention",
    "attention_output_norm": "of attention's output",
    "mlp_norm": "before the MLP or the experts",
    "mlp_output_norm": "of the MLP's output",
}


def main() -> None:
    PAGE.write_text(render_page())
    print(f"written: {PAGE.relative_to(ROOT)}")


def render_page() -> str:
    """The text of docs/families.md."""
    lines = [
        "# Families, one by one",
        "",
        "`make support` writes this page; a test checks that it is current. Each card says what a family's layers",
        "consist of, which of it a `config.json` chooses, where each weight of a file goes in megatron-core, and which",
        "command runs the tests with a small model of that family. The tables of weights are those that loading,",
        "export, refit and conversion use.",
        "",
    ]
    for name in sorted(ARCHITECTURES):
        lines += _card(ARCHITECTURES[name])
    return "\n".join(lines)


def _card(architecture: Architecture) -> Iterator[str]:
    name = architecture.model_type
    yield from (f"## {name}", "", f"The tests read the `config.json` of {', '.join(REAL_MODELS[name])}.", "")
    yield from ("| part | built |", "| --- | --- |")
    for part, value in _parts(architecture).items():
        yield f"| {part} | {value} |"
    yield from ("", "| compared or run | by |", "| --- | --- |")
    for column in COLUMNS:
        yield f"| {column} | {describe_column(name, column)} |"
    yield f"| conversion to NeMo 2 | {'its class ' + architecture.nemo if architecture.nemo else 'refused'} |"
    yield from ("", "| in Hugging Face's files | in megatron-core | split by tensor parallelism |")
    yield "| --- | --- | --- |"
    for weight in (EMBEDDING, *architecture.layer.values(), FINAL_NORM, OUTPUT):
        yield _weight(weight)
    yield ""


def _parts(architecture: Architecture) -> dict[str, str]:
    switched = [f"`{key}`" for key in architecture.switches]
    norms = ", ".join(_ROLES[role] for role in _ROLES if role in architecture.norms)
    heads = "over all heads together" if architecture.wide_qk_norm else "of each head"
    rope = "of each head's first part, by `partial_rotary_factor`" if architecture.partial_rope else "of whole heads"
    return {
        "norms": norms + (f"; of queries and keys, {heads}" if architecture.qk_norm else ""),
        "biases": "of queries, keys and values" if architecture.qkv_bias else "none unless the config asks for them",
        "MLP": "a router, and experts without capacity" if architecture.experts else "gate, up and down",
        "rope": rope + ("; in some layers none" if architecture.ropeless_layers else ""),
        "sliding window": _WINDOWS[architecture.window],
        "switches of the config": ", ".join(switched) or "none",
    }


def _weight(weight: Weight) -> str:
    parts = ", ".join(f"`{part}`" for part in weight.parts)
    split = {None: "no", 0: "by rows", 1: "by columns"}[weight.split]
    return f"| {parts} | `{weight.name}` | {split} |"


if __name__ == "__main__":
    main()
