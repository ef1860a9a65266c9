"""What routers did, as a section of the report's page: rows by expert as a plot of bars for each layer, and a table.

Drawn here and not by the page's script, so that it can be read without JavaScript. A layer's experts stand in the order of the
ranks that hold them, with a gap between two ranks, and a line at the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dspass.report.records import ExpertLayer

#: Layers that are drawn, those whose ranks are least even first; the table has all.
_DRAWN = 8

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 96, 18, 4
_GAP = 8.0


def experts_html(layers: Sequence[ExpertLayer]) -> str:
    """The section, or nothing where no experts are divided over ranks."""
    if not layers:
        return ""
    uneven = sorted(layers, key=lambda layer: -layer.rank_imbalance)
    head = ("Layer", "Experts", "Ranks", "Rows", "Busiest rank over mean", "Busiest expert over mean", "Dropped here")
    header = "".join(f'<th scope="col"{_NUMBER if i else ""}>{h}</th>' for i, h in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_NUMBER if i else ''}>{escape(cell)}</td>" for i, cell in enumerate(_cells(layer)))
        + "</tr>"
        for layer in layers
    )
    return f"""
  <section class="card" aria-labelledby="experts-title">
    <div class="card-head">
      <h2 id="experts-title">Experts</h2>
      <p class="muted">Rows for each expert in one optimiser step, of all ranks that a layer's experts are divided over</p>
    </div>
    {"".join(map(_plot, uneven[:_DRAWN]))}
    <div class="table-box"><table class="figures"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>
  </section>
"""


_NUMBER = ' class="number"'


def _cells(layer: ExpertLayer) -> tuple[str, ...]:
    uneven = f"{layer.rank_imbalance:.2f}", f"{layer.expert_imbalance:.2f}"
    return layer.name, str(len(layer.rows)), str(layer.ranks), str(sum(layer.rows)), *uneven, str(layer.dropped)


def _plot(layer: ExpertLayer) -> str:
    """A bar for each expert. Those of many share columns of the screen, and are still the layer's outline."""
    by_rank = max(len(layer.by_rank), 1)
    here = max(len(layer.rows) // by_rank, 1)
    width = (_WIDTH - _GAP * (by_rank - 1)) / max(len(layer.rows), 1)
    scale = (_HEIGHT - _TOP - _BOTTOM) / max(*layer.rows, 1) if layer.rows else 0.0
    parts = []
    for i, count in enumerate(layer.rows):
        x, height = i * width + i // here * _GAP, count * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" width="{max(width - 1, 0.5):.1f}" height="{height:.1f}">'
            f"<title>expert {i} on rank {i // here}: {count} rows</title></rect>"
        )
    mean = _HEIGHT - _BOTTOM - scale * sum(layer.rows) / max(len(layer.rows), 1)
    name = escape(layer.name)
    label = f"{name}: rows of {len(layer.rows)} experts, the busiest has {layer.expert_imbalance:.2f} of the mean"
    return (
        f'<div class="chart"><svg class="experts-plot" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<text x="0" y="11">{name}</text>{"".join(parts)}'
        f'<line class="mean" x1="0" x2="{_WIDTH}" y1="{mean:.1f}" y2="{mean:.1f}"/></svg></div>'
    )
