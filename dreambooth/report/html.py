"""Builds the smallest parts of the report page: escaped text, sections, tables, durations, style.

Standard library only. Prompts, file names and settings come from strangers, so each passes through
`text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MAX_TEXT = 2_000  # characters of one prompt, name or setting


def text(value: object) -> str:
    """Return an untrusted text, printable and escaped for HTML and for quoted attributes.

    It is cut after MAX_TEXT characters.
    """
    plain = str(value)
    if len(plain) > MAX_TEXT:
        plain = plain[:MAX_TEXT] + " …"
    return escape("".join(c if c.isprintable() else _spelled(c) for c in plain))


def _spelled(letter: str) -> str:
    """Return a space or the escape code for a character that must not reach a page as it is.

    These are control characters, writing-direction marks and lone surrogates.
    """
    return " " if letter.isspace() else letter.encode("unicode_escape").decode("ascii")


def section(title: str, body: str, note: str = "") -> str:
    """Return a part of the page under a heading; all three arguments are HTML."""
    paragraph = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{paragraph}{body}</section>"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of (name, text); a row without a name is one wide cell."""
    cells = "".join(
        f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>"
        if name
        else f'<tr><td colspan="2">{text(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def duration(seconds: float) -> str:
    """Return a time with its unit: "34 ms", "8.2 s", "2 min 30 s" or "2 h 1 min"."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


STYLE = """
:root{color-scheme:light dark;--paper:#faf9f6;--card:#fff;--ink:#23232a;--soft:#6a6862;
--line:#e4e1da;--grid:#e4e1da;--series-1:#2461c9;--series-2:#c2570c;--mark:#b42318;
--changed:#eef3fd;--alarm:#fdeceb}
@media (prefers-color-scheme:dark){:root{--paper:#17171a;--card:#202024;--ink:#ececea;
--soft:#a09e98;--line:#36363c;--grid:#36363c;--series-1:#7aa7ff;--series-2:#f0a066;--mark:#ff8a80;
--changed:#24304a;--alarm:#43211f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:break-word;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
header p{margin:6px 0}.kicker{color:var(--soft);text-transform:uppercase;letter-spacing:.08em;
font-size:12px}
h1{font-size:clamp(24px,5vw,36px);line-height:1.2;margin:0}
h2{font-size:20px;margin:0 0 8px}
section{margin-top:36px}
.note,figcaption,figcaption span{color:var(--soft);font-size:14px}
.note{margin:0 0 12px;max-width:70ch}
.alarm{background:var(--alarm);border-left:4px solid var(--mark);padding:10px 14px}
.warnings{margin:0;padding:10px 14px 10px 32px;border-left:4px solid var(--series-2);
background:var(--card);font-size:15px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:8px;
margin-top:16px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tiles b{display:block;font-size:20px;line-height:1.25}.tiles span{color:var(--soft);font-size:13px}
figure{margin:0}figcaption{margin-top:4px}figcaption b{color:var(--ink)}
img{display:block;max-width:100%;height:auto;border-radius:4px;background:var(--line)}
img.small{image-rendering:pixelated}
.drawn{display:grid;gap:16px;align-items:start}
.final img{width:100%;max-width:360px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(72px,1fr));gap:8px}
.strip img,.grid img,.crops img{width:100%}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:6px}
.charts,.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));
gap:16px}
.charts figure,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:10px}
.charts figcaption{margin:0 0 4px}.chart{display:block;width:100%;height:auto}
.key{margin-left:10px;white-space:nowrap}
.key i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:5px;
vertical-align:middle}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px;align-items:start}
.whole{position:relative}.whole img{width:100%}
.whole svg{position:absolute;inset:0;width:100%;height:100%}
.whole rect{fill:none;stroke:#fff;stroke-opacity:.7;vector-effect:non-scaling-stroke}
.whole rect.here{stroke:var(--crop);stroke-opacity:1;stroke-width:2}
.crops:not(.n1) img{border:2px solid var(--crop)}
.c0{--crop:#ffb000}.c1{--crop:#4fc3f7}.c2{--crop:#f06292}.c3{--crop:#9ccc65}
.crops{display:grid;gap:4px;grid-template-columns:1fr 1fr}.crops.n1{grid-template-columns:1fr}
table{border-collapse:collapse;width:100%;max-width:760px;font-size:15px;margin-bottom:8px}
th,td{text-align:left;vertical-align:top;padding:6px 10px 6px 0;border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--soft);width:38%}th,td{overflow-wrap:anywhere}
.settings th{width:46%;overflow-wrap:normal}
.num{white-space:nowrap;width:1%}
.bar{width:45%}.bar i{display:block;height:10px;min-width:2px;margin-top:7px;border-radius:3px;
background:var(--series-1)}
.twin{display:grid;gap:0 40px;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.settings td:last-child{color:var(--soft)}
.changed th{color:var(--ink);font-weight:600}.changed{background:var(--changed)}
.settings th,.settings td{padding-left:8px}
summary{cursor:pointer;padding:8px 0}
@media (min-width:720px){.drawn.both{grid-template-columns:320px 1fr}
.strip{grid-template-columns:repeat(auto-fill,minmax(120px,1fr))}
.grid{grid-template-columns:repeat(auto-fill,minmax(116px,1fr))}}
@media print{section{break-inside:avoid}}
"""
