"""A report as Markdown, and the same as one HTML page that needs no other file: plots inside, tables that sort."""

import base64
import functools
import html
import re
from collections.abc import Iterable
from pathlib import Path

import markdown_it

STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f4f6f8; --text: #1f2328; --link: #0072b2; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #1b2129; --text: #e6edf3; --link: #56b4e9; --page: #0d1117 }
  img { background: #fff; border-radius: 4px }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 72rem; padding: 0 1.5rem }
h1, h2, h3 { line-height: 1.25 } h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem; margin-top: 2.2rem }
a { color: var(--link) } img { max-width: 100% } code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: var(--soft); padding: .8rem; overflow-x: auto }
nav { columns: 3; font-size: 14px; margin: 1rem 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; white-space: nowrap }
th { background: var(--soft); vertical-align: bottom; cursor: pointer } th[aria-sort]::after { content: " ▾" }
th[aria-sort=ascending]::after { content: " ▴" }
td[style*=right], th[style*=right] { text-align: right } tbody tr:hover { background: var(--soft) }
"""
# A click on the head of a column sorts its rows, numbers by value, largest first; a second click reverses.
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex
  const down = head.getAttribute("aria-sort") !== "descending"
  const key = row => { const text = row.cells[column].textContent.trim(), n = parseFloat(text.replaceAll(",", ""))
    return isNaN(n) ? text : n }
  const rows = [...body.rows].sort((a, b) => { const [x, y] = [key(a), key(b)]
    if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1
    return (x < y ? 1 : x > y ? -1 : 0) * (down ? 1 : -1) * (typeof x === "number" ? 1 : -1) })
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort")
  head.setAttribute("aria-sort", down ? "descending" : "ascending")
  body.append(...rows)
})
"""


def write(folder, blocks: Iterable[str], name: str = "report") -> list[Path]:
    """Write folder/NAME.md from blocks of Markdown, and folder/NAME.html with the images of the folder in it."""
    folder = Path(folder)
    text = "\n\n".join(blocks) + "\n"
    files = [folder / f"{name}.md", folder / f"{name}.html"]
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(to_html(text, folder), encoding="utf-8")
    return files


def to_html(text: str, folder) -> str:
    """One HTML page of Markdown whose images are files of `folder`."""
    body = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'<img src="([^"]*)" alt="([^"]*)" ?/?>', functools.partial(_image, Path(folder)), body)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = body.replace("&lt;br&gt;", "<br>")  # the only HTML that our tables have
    heads = []

    def head(match: re.Match) -> str:
        heads.append(match[1])
        return f'<h2 id="s{len(heads)}">{match[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", head, body)
    links = "<br>".join(f'<a href="#s{i}">{title}</a>' for i, title in enumerate(heads, 1))
    body = body.replace("</h1>", f"</h1>\n<nav>{links}</nav>", 1)
    title = match[1] if (match := re.search(r"<h1>(.*?)</h1>", body)) else "Report"
    title = html.escape(html.unescape(title))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}<script>{SCRIPT}</script></body></html>\n"
    )


def _image(folder: Path, match: re.Match) -> str:
    """A plot, with its content; of any other image, which may stand in a text, the words."""
    name, words = match.groups()
    kind = {".svg": "image/svg+xml", ".png": "image/png"}.get(Path(name).suffix)
    if not kind or not re.fullmatch(r"plots/[\w.-]+", name) or not (folder / name).is_file():
        return f"![{words}]({name})"
    return f'<img src="data:{kind};base64,{base64.b64encode((folder / name).read_bytes()).decode()}" alt="{words}">'
