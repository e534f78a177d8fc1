"""The one HTML writer: a page in a single file that opens without a network."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, currentColor 15%, transparent) }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left } figure { margin: 1.2rem 0 }
img { max-width: 100%; background: #fff; border-radius: 6px } figcaption { opacity: .75; font-size: .9rem }
pre { background: var(--faint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem }
"""


def require_matplotlib(subject: str = "a picture") -> None:
    """Raise where nothing can be drawn: before the work that would be shown, rather than after it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as missing:
        raise ImportError(f"{subject} needs matplotlib; pip install 'anchor-attn[plots]'.") from missing


class Page:
    """An HTML page that grows from top to bottom; every text given to it is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section begins."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def bullets(self, texts: Iterable[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        """Preformatted text."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>")

    def figure(self, figure: "Figure", caption: str) -> None:
        """A matplotlib figure, as a PNG inside the page."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        data = base64.b64encode(picture.getvalue()).decode()
        caption = html.escape(caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = (
            f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style>"
        )
        body = "\n".join(self._parts)
        path.write_text(
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n', encoding="utf-8"
        )
