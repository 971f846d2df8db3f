"""The house style of every picture: one template, one set of colours, one kind of live figure.

The colours can be told apart by colour-blind readers. For formats the hue says the family (grey:
floating point as trained, blue: integers, orange: normal float, green: small floats, purple:
microscaled) and the darkness says the bits. The components use Paul Tol's muted scheme, and the
experts the one of Okabe and Ito (2008), then the same hues lightened.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import traitlets
from plotly.graph_objects import Figure

# With this widget comes jsonschema, and with that, where it is installed, a check of web addresses
# that no figure has and that takes 3 seconds to set up (rfc3987_syntax 1.1.0).
sys.modules.setdefault("rfc3987_syntax", None)
from plotly.graph_objects import FigureWidget  # noqa: E402

_OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
    "#404040",
)

COLORS: dict[str, str] = {
    # storage formats
    "fp32": "#252525",
    "float32": "#252525",
    "fp16": "#6B6B6B",
    "float16": "#6B6B6B",
    "bf16": "#9A9A9A",
    "int8": "#08519C",
    "int7": "#1764AB",
    "int6": "#2878B8",
    "int5": "#4A98C9",
    "int4": "#6BAED6",
    "int3": "#9ECAE1",
    "int2": "#C6DBEF",
    "nf8": "#7F2704",
    "nf7": "#983003",
    "nf6": "#B33B02",
    "nf5": "#CB4A02",
    "nf4": "#E6550D",
    "nf3": "#FD8D3C",
    "nf2": "#FDBE85",
    "fp8": "#2E6B30",
    "fp8_e4m3": "#2E6B30",
    "fp4": "#9BE39A",
    "nvfp4": "#45125F",
    "mxfp4": "#F7C4DE",
    # components of a model
    "embeddings": "#44AA99",
    "attention": "#332288",
    "router": "#CC6677",
    "experts": "#DDCC77",
    "shared_experts": "#999933",
    "dense_mlp": "#117733",
    "norms": "#BBBBBB",
    "lm_head": "#88CCEE",
    "kv_cache": "#AA4499",
    "other": "#E0E0E0",
    # experts
    **{f"expert {index}": color for index, color in enumerate(_OKABE_ITO)},
    "expert 8": "#80B9D9",
    "expert 9": "#F3CF80",
    "expert 10": "#80CFB9",
    "expert 11": "#EAAF80",
    "expert 12": "#ABDAF4",
    "expert 13": "#E6BCD3",
    "expert 14": "#F8F2A1",
    "expert 15": "#A0A0A0",
    # kinds of memory
    "anonymous": "#0072B2",
    "rss": "#7A7A7A",
    "gpu allocated": "#D55E00",
    "gpu reserved": "#E69F00",
    "predicted": "#252525",
}

INK = "#252525"
SOFT_INK = "#5F5F5F"
_GRID = "#E6E6E6"
_AXIS = {
    "gridcolor": _GRID,
    "zerolinecolor": "#B8B8B8",
    "linecolor": "#B8B8B8",
    "ticks": "outside",
    "tickcolor": "#B8B8B8",
    "title": {"standoff": 10, "font": {"size": 13}},
    "automargin": True,
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        "title": {
            "x": 0.01,
            "xanchor": "left",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
            "font": {"size": 16},
            "subtitle": {"font": {"size": 12, "color": SOFT_INK}},
        },
        "colorway": _OKABE_ITO,
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 70, "r": 25, "t": 70, "b": 95},
        "hoverlabel": {"font": {"family": "Inter, Helvetica, Arial, sans-serif"}, "align": "left"},
        "legend": {
            "orientation": "h",
            "xref": "container",
            "x": 0.01,
            "yref": "container",
            "y": 0.01,
            "yanchor": "bottom",
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from `floor` to `top`; `cut` if smaller values are drawn at `floor`."""

    floor: float
    top: float
    cut: bool

    @classmethod
    def over(cls, values, least: float) -> "LogAxis":
        """For all `values` above `least`, of an array or a table; with others it begins a decade.

        NaN is none of them.
        """
        seen = np.asarray(values, dtype=float)
        seen = seen[np.isfinite(seen)]
        above = seen[seen > least]
        smallest = above.min() if len(above) else 1.0
        cut = len(above) < len(seen)
        floor = 10.0 ** math.floor(math.log10(smallest)) if cut else smallest
        return cls(floor, above.max(initial=10 * floor), cut)

    def layout(self, title: str) -> dict:
        first, last = math.log10(self.floor), math.log10(self.top)
        exponents = range(math.ceil(first - 1e-9), math.ceil(last) + 1)
        texts = [
            f"{10.0**exponent:g}" if first >= -3 else f"10<sup>{exponent}</sup>"
            for exponent in exponents
        ]
        return {
            "title": title,
            "type": "log",
            "range": [first - 0.05 * (last - first), last + 0.05 * (last - first)],
            "tickvals": [10.0**exponent for exponent in exponents],
            "ticktext": [texts[0] + "<br>or less" * self.cut, *texts[1:]],
        }


class LiveFigure(FigureWidget):
    """A figure widget whose page does not give up while plotly is still on its way.

    A FigureWidget is a JavaScript module of 5 MB, and the page waits for a module two seconds: on a
    busy machine the chart stays empty. Here the module is a few lines, and plotly follows as data.
    """

    _esm = """
    const widgets = new WeakMap();
    async function start(model) {
      const source = new Blob([model.get("_plotly")], { type: "text/javascript" });
      let widget = (await import(URL.createObjectURL(source))).default;
      widget = typeof widget === "function" ? await widget() : widget;
      await widget.initialize({ model });
      return widget;
    }
    export default {
      async render({ model, el }) {
        if (!widgets.has(model)) widgets.set(model, start(model));
        return (await widgets.get(model)).render({ model, el });
      },
    };
    """
    _plotly = traitlets.Unicode(str(FigureWidget._esm)).tag(sync=True)


def changeable(figure: Figure) -> FigureWidget:
    """The same figure as a widget, which can change in place after it is shown (`apps.redraw`)."""
    return LiveFigure(figure)
