"""The pages' style sheet: one column that a phone can show, on light or dark paper.

Text has a contrast of at least 4.5 with what it stands on, in both schemes; a test measures it.
"""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2430; --muted: #596070;
  --rule: #e3e6eb; --strong: #b9bfc9; --block: #f4f5f7; --chosen: #fdf1e7; --link: #0b62a4;
  --warning: #fff5d9; --accent: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e4e7ec; --muted: #a2aab7;
  --rule: #2c323c; --strong: #515a69; --block: #1d222a; --chosen: #372818; --link: #7fbdf0;
  --warning: #3a3115; --accent: #e8792a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: break-word; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 80px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 14px; letter-spacing: -0.01em; }
h2 { font-size: 20px; line-height: 1.3; margin: 44px 0 8px; padding-top: 18px;
  border-top: 1px solid var(--rule); }
h3 { font-size: 15px; font-weight: 600; margin: 22px 0 0; }
.panel h3 { font-size: 14px; margin: 8px 0 0; }
p { max-width: 76ch; margin: 8px 0 14px; }
a { color: var(--link); }
.lead { font-size: 18px; border-left: 4px solid var(--accent); padding: 2px 0 2px 16px;
  margin: 16px 0 22px; }
.lead p { margin: 4px 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 22px 0 0; font-size: 14px; }
nav a { text-decoration: none; padding: 3px 0; }
nav a:hover { text-decoration: underline; }
section { scroll-margin-top: 12px; }
pre { background: var(--block); border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 10px 0; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 13.5px; margin: 10px 0; display: block;
  max-width: 100%; overflow-x: auto; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--strong); }
th:first-child, td:first-child { text-align: left; padding-left: 8px; }
th.words, td.words { text-align: left; }
tr.chosen td { background: var(--chosen); font-weight: 600; }
table.summary th, table.text th { border-bottom: 1px solid var(--rule); vertical-align: top;
  text-align: left; padding-right: 18px; }
table.summary td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.text td { text-align: left; }
table.compact { font-size: 13px; }
table.compact th, table.compact td { padding: 3px 8px; }
.panels { display: grid; gap: 8px 20px; margin: 8px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(310px, var(--room, 0px))), 1fr)); }
.panel { min-width: 0; }
.figure { margin: 4px 0; overflow-x: auto; overflow-y: hidden; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0;
  margin: 10px 0 4px; font-size: 13.5px; }
.key { display: inline-block; min-width: 1.3em; font-weight: 700; }
.figure svg text:not(.hoverlayer text):not(.heatmap-label text) { fill: var(--ink) !important; }
.figure .gridlayer path { stroke: var(--rule) !important; }
.figure .shapelayer path { stroke: var(--muted) !important; }
.figure path.zl, .figure .xaxislayer-above path, .figure .yaxislayer-above path {
  stroke: var(--strong) !important; }
.warning { background: var(--warning); border-left: 4px solid #c07c00; padding: 8px 14px; }
.note { color: var(--muted); font-size: 14px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--link); font-size: 14.5px; }
dt { font-weight: 600; margin-top: 10px; }
dd { margin: 0; max-width: 76ch; }
@media (max-width: 600px) {
  main { padding: 22px 16px 56px; }
  h1 { font-size: 23px; } h2 { font-size: 18.5px; margin-top: 40px; } .lead { font-size: 16.5px; }
  nav a { padding: 6px 0; }
  th, td { padding: 5px 7px; }
  thead th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper);
    white-space: normal; min-width: 104px; max-width: 132px; }
}
@media print { main { max-width: none; } h2 { break-after: avoid; } nav { display: none; } }
"""
