"""The page's style sheet: light, narrow enough to read, wide enough for three panels."""

from __future__ import annotations

CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1f2430; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 80px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 20px; }
h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 16px; border-top: 1px solid #e3e6eb; }
p { max-width: 76ch; margin: 8px 0 14px; }
pre { background: #f5f6f8; border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  font: 13.5px/1.5 ui-monospace, monospace; margin: 10px 0; }
table { border-collapse: collapse; font-size: 13.5px; margin: 10px 0; display: block;
  overflow-x: auto; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #eef0f3; }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid #b9bfc9; }
th:first-child, td:first-child { text-align: left; padding-left: 8px; }
tr.chosen td { background: #fdf3ec; font-weight: 600; }
table.summary th { border-bottom: 1px solid #eef0f3; vertical-align: top; text-align: left; }
table.summary td { text-align: left; white-space: normal; }
table.compact { font-size: 13px; }
table.compact th, table.compact td { padding: 3px 8px; }
.figure { margin: 12px 0 4px; min-height: 40px; }
.warning { background: #fff6dd; border-left: 4px solid #e69f00; padding: 8px 14px; }
details { margin: 10px 0; }
summary { cursor: pointer; }
dt { font-weight: 600; margin-top: 10px; }
dd { margin: 0; max-width: 76ch; }
@media print { main { max-width: none; } h2 { break-after: avoid; } }
"""
