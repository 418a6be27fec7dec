"""The style sheet and the one script of the HTML pages, kept in the page itself so that it needs no other file."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#17181a;--soft:#5b5f66;--line:#dcdcd8;
--before:#c9cdd4;--s1:#2a6fdb;--s2:#12936a;--s3:#b8bcc4;--s4:#c76b12;--s5:#8a4fd0;--s6:#b8246f;--s7:#0b8195;
--s8:#7c6a00;--good:#12805c;--bad:#c0362c;--focus:#2a6fdb}
@media (prefers-color-scheme:dark){:root{--page:#131416;--card:#1c1e21;--ink:#eceded;--soft:#a3a8b0;--line:#34373c;
--before:#4a4e56;--s1:#6aa5ff;--s2:#3fc195;--s3:#6a6f78;--s4:#f0a050;--s5:#c49bff;--s6:#ff86bd;--s7:#52cfe4;
--s8:#d8c14e;--good:#4fcf9f;--bad:#ff8277;--focus:#8ab8ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:0 0 12px}
p{margin:0 0 10px;max-width:84ch}.soft{color:var(--soft)}.lead{font-size:1.05rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0 0;padding:0;
list-style:none}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.tiles span{display:block;color:var(--soft);font-size:.84rem}
.tiles strong{display:block;font-size:1.5rem;line-height:1.3;overflow-wrap:anywhere}.good{color:var(--good)}
.bad{color:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;list-style:none;font-size:.88rem}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.45em;vertical-align:-.03em}
.strip{display:flex;gap:2px;height:16px}.strip i{display:block;border-radius:3px;min-width:2px}
.bullet{position:relative;height:16px;background:color-mix(in srgb,var(--before) 45%,transparent);border-radius:3px;
margin:26px 0 4px}.bullet i{position:absolute;left:0;top:0;bottom:0;border-radius:3px}
.bullet b{position:absolute;top:-5px;bottom:-5px;width:2px;background:var(--ink)}
.bullet em{position:absolute;top:-26px;font-style:normal;font-size:.8rem;white-space:nowrap}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 7px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
thead th{vertical-align:bottom;color:var(--soft);font-weight:600;background:var(--card)}.n{text-align:right}
.w{white-space:normal;min-width:24ch}
td:first-child,th:first-child{position:sticky;left:0;background:var(--card);padding-left:0}
td.name{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.82rem;white-space:normal;
overflow-wrap:anywhere;min-width:27ch}tr.off td{color:var(--soft)}
tfoot td{font-weight:600;border-top:2px solid var(--ink);border-bottom:0}
th button{all:unset;cursor:pointer;font:inherit}
th button:focus-visible{outline:2px solid var(--focus);outline-offset:2px}
th button{text-decoration:underline dotted;text-underline-offset:3px}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
.bar{display:block;width:70px;height:9px;margin-top:.5em;border-radius:2px;overflow:hidden;background:var(--before)}
.bar b{display:block;height:100%;background:var(--s1)}
.label{margin:6px 0 2px;font-size:.84rem;color:var(--soft)}
.segments{display:flex;gap:1px;height:22px;min-width:2px;overflow:hidden;border-radius:3px}.segments i{min-width:1px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:var(--soft);font-size:12px}
svg.plot text{font-size:10.5px}svg .line{fill:none;stroke-width:2;stroke-linejoin:round}svg .grid{stroke:var(--line)}svg .axis{stroke:var(--soft)}
.legend+.charts{margin-top:20px}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:24px}figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.92rem;margin-bottom:6px}ul.notes{margin:0;padding-left:1.2em}
ul.notes li{overflow-wrap:anywhere}footer{margin-top:20px;color:var(--soft);font-size:.84rem}
svg .level{stroke:var(--bad);stroke-dasharray:2 3}figure.wide{max-width:760px}
details{margin-top:12px}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
.bars{margin:0;padding:0;list-style:none;font-size:.82rem}
.bars li{display:grid;grid-template-columns:minmax(12ch,30ch) 3fr 2fr;gap:4px 16px;align-items:center;padding:3px 0;
border-top:1px solid var(--line)}.bars li:first-child{border-top:0;color:var(--soft)}.bars em{font-style:normal}
.bars span{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.78rem;overflow-wrap:anywhere}
.bars div{position:relative;height:12px}.bars i,.bars b{position:absolute;left:0;border-radius:2px;min-width:1px}
.bars i{top:0;bottom:0;background:var(--before)}.bars b{top:2px;bottom:2px;background:var(--s1)}
.bars b.share{background:var(--s4)}
@media (max-width:640px){figure.wide svg text{font-size:19px}svg.plot text{font-size:12.5px}.bars li{grid-template-columns:3fr 2fr;gap:2px 10px}.bars span{grid-column:1/-1}
main{padding:18px 12px 32px}section{padding:14px 12px}td.name{min-width:15ch;max-width:19ch;
font-size:.76rem}th,td{padding:5px 7px}.charts{grid-template-columns:1fr}.tiles{grid-template-columns:1fr 1fr}
.tiles strong{font-size:1.25rem}}
@page{size:A4 landscape;margin:12mm}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--before:#bbb;--s1:#1f57b5;
--s2:#0d7a57;--s3:#999;--s4:#a85808;--s5:#6f3bb0;--s6:#96185a;--s7:#076676;--s8:#625400;--good:#0b6b4c;--bad:#a3261d}body{font-size:10pt}main{max-width:none;padding:0}
section{border:0;padding:0;margin-top:14pt}.scroll{overflow:visible}table{font-size:7.4pt}th,td{padding:2pt 3pt}
td.name{font-size:6.8pt;min-width:17ch}.w{min-width:19ch}.charts{grid-template-columns:1fr 1fr;gap:8px 24px}.charts svg{max-height:56mm}figure.wide svg{max-height:90mm}.bar{width:40px}th button{text-decoration:none}
th button::after{content:""}td:first-child,th:first-child{position:static}thead{display:table-header-group}tfoot{display:table-row-group}
.bars li{padding:1pt 0}tr,.tiles li,.bars li,figure{break-inside:avoid}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# Sorting is a comfort: without scripts the table stands in the model's own order.
SCRIPT = """
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort"), numbers = head.dataset.first === "desc";
      const up = numbers ? now === "descending" : now !== "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const order = (a, b) => {
        const x = value(a), y = value(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const cmp = numbers ? x - y : x.localeCompare(y, undefined, {numeric: true});
        return up ? cmp : -cmp;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
"""
