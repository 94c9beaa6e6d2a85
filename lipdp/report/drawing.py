"""A network as a drawing: each call a box, X and G on the edges."""

from collections.abc import Sequence
from html import escape

from lipdp.report.numbers import LayerRow, short

_WIDTH, _HEIGHT, _GAP, _BESIDE = 230, 46, 58, 90


def drawing(layers: Sequence[LayerRow]) -> str:
    """SVG of the network, top to bottom; colours are the page's.

    A row holds the calls that are as far from an input as each other; edges that pass by a row
    swing out to its left.
    """
    inputs = max((-1 - s for row in layers for s in row.sources if s < 0), default=0) + 1
    level = {-1 - i: 0 for i in range(inputs)}
    for index, row in enumerate(layers):
        level[index] = 1 + max((level[s] for s in row.sources), default=0)
    rows: dict[int, list[int]] = {}
    for node, height in level.items():
        rows.setdefault(height, []).append(node)
    widest = max(len(nodes) for nodes in rows.values())
    width = widest * (_WIDTH + _BESIDE) + 2 * _BESIDE
    place = {}
    for height, nodes in rows.items():
        for column, node in enumerate(nodes):
            x = width / 2 + (column - (len(nodes) - 1) / 2) * (_WIDTH + _BESIDE)
            place[node] = (x, 10 + height * (_HEIGHT + _GAP))
    end = max(level.values()) + 1
    total = 10 + end * (_HEIGHT + _GAP) + 24

    edges, boxes = [], []
    for index, row in enumerate(layers):
        pairs = zip(row.sources, row.input_bounds, row.input_cotangents, strict=True)
        for source, x, g in pairs:
            edges.append(_edge(place[source], place[index], level[index] - level[source], x, g))
    for node, (x, y) in place.items():
        boxes.append(_box(layers, node, x, y))
    read = {s for row in layers for s in row.sources}
    for index, row in enumerate(layers):
        if index not in read:
            x, y = place[index]
            edges.append(
                _edge((x, y), (x, y + _HEIGHT + _GAP), 1, row.output_bound, row.cotangent_bound)
            )
            boxes.append(
                f'<text class="name" x="{x}" y="{y + _HEIGHT + _GAP + 16}" '
                'text-anchor="middle">loss</text>'
            )
    return (
        f'<svg class="network" viewBox="0 0 {width:.0f} {total:.0f}" role="img" '
        f'style="max-width:{width:.0f}px" aria-label="The network, with the bound X of each input '
        f'and G of each cotangent">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _edge(start, end, levels, x_bound, g_bound):
    (x0, y0), (x1, y1) = (start[0], start[1] + _HEIGHT), end
    swing = -(_WIDTH / 2 + _BESIDE) if levels > 1 else 0
    path = (
        f"M{x0},{y0} C{x0 + swing:.0f},{y0 + _GAP * 0.6:.0f} "
        f"{x1 + swing:.0f},{y1 - _GAP * 0.6:.0f} {x1},{y1}"
    )
    # Near its end, where edges that share a source are apart.
    x, y = x0 + 0.65 * (x1 - x0) + 0.75 * swing * 0.8, (y0 + y1) / 2 if levels > 1 else y1 - 24
    return (
        f'<path class="edge" d="{path}"/>'
        f'<text class="bound" x="{x + 8:.0f}" y="{y:.0f}">X ≤ {short(x_bound)} ↓</text>'
        f'<text class="bound" x="{x + 8:.0f}" y="{y + 15:.0f}">G ≤ {short(g_bound)} ↑</text>'
    )


def _box(layers, node, x, y):
    if node < 0:
        kind, name, kinds = "input", "", "box"
    else:
        row = layers[node]
        kind, name = row.kind, row.layer
        kinds = "box weighted" if row.weights else "box"
    left = x - _WIDTH / 2
    note = "" if node < 0 else f"<title>{escape(layers[node].note or kind)}</title>"
    return (
        f'<g class="{kinds}">{note}<rect x="{left:.0f}" y="{y}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" rx="8"/>'
        f'<text class="name" x="{x:.0f}" y="{y + (20 if name else 28)}" text-anchor="middle">'
        f"{escape(_cut(kind))}</text>"
        f'<text class="bound" x="{x:.0f}" y="{y + 37}" text-anchor="middle">'
        f"{escape(_cut(name))}</text></g>"
    )


def _cut(text, length=28):
    return text if len(text) <= length else text[: length - 1] + "…"
