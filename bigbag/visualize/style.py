"""The look of the report: dark on light, one column on a phone, made to be printed too."""

from __future__ import annotations

STYLE = """
:root { --ink: #1d2733; --muted: #5a6675; --line: #dde3ea; --pale: #f5f7fa; --accent: #17557a;
  --negative: #3b6ea8; --positive: #b5332e; --good: #23724a; color-scheme: light; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 36px; }
header .kind { margin: 0; color: var(--accent); font-weight: 600; font-size: .82rem; letter-spacing: .04em; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 2px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 52px 0 4px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 6px 0 12px; max-width: 76ch; }
a { color: var(--accent); }
.lead { font-size: 1.1rem; margin: 22px 0 16px; max-width: none; }
.wide { max-width: 110ch; }
.muted, figcaption, .facts { color: var(--muted); font-size: .9rem; }
.facts { margin: 0; max-width: none; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 14px 0 0;
  font-size: .92rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0;
  padding: 0; }
.cards div { background: var(--pale); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.cards dt { color: var(--muted); font-size: .84rem; line-height: 1.3; }
.cards dd { margin: 2px 0 0; font-size: 1.65rem; font-weight: 600; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.cards dd.none { font-size: .98rem; font-weight: 500; color: var(--muted); padding-top: 8px; }
.cards .first { border-left: 4px solid var(--accent); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px 26px;
  margin: 14px 0; }
figure { margin: 0; min-width: 0; }
figure > img { width: 100%; max-width: 600px; height: auto; display: block; }
figcaption { margin-top: 4px; }
figcaption b, .title { color: var(--ink); font-weight: 600; }
.title { margin: 0 0 6px; font-size: .95rem; }
.note { border-left: 4px solid #c98a1b; background: #fdf8ec; padding: 8px 14px; margin: 12px 0;
  border-radius: 0 6px 6px 0; }
.scroll { overflow-x: auto;
  background: linear-gradient(to left, #fff 24px, #fff0 48px) right / 48px 100% no-repeat local,
    linear-gradient(to left, #1d273333, #1d273300) right / 18px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: 6px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
.numbers td, .numbers tbody th { white-space: nowrap; }
.numbers th:first-child { position: sticky; left: 0; background: #fff; padding-right: 12px; overflow-wrap: normal; }
.numbers small { display: block; color: var(--muted); }
.wrong { color: var(--positive); font-weight: 600; }
.right { color: var(--good); }
.confusion { max-width: 380px; }
.confusion th, .confusion td { text-align: center; padding: 10px 6px; }
.confusion td { border: 2px solid #fff; border-radius: 4px; }
.confusion td b { display: block; font-size: 1.35rem; line-height: 1.2; }
.confusion td span { font-size: .82rem; }
.confusion tbody th { text-align: left; }
.confusion tr > :first-child { overflow-wrap: normal; }
.slide { margin: 26px 0 40px; }
.views { display: grid; gap: 14px; margin-top: 12px; align-items: start;
  grid-template-columns: minmax(0, 5fr) minmax(0, 5fr) minmax(0, 2.42fr); }
.views.two { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.views svg { display: block; width: 100%; height: auto; max-height: 640px; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; }
.closeups { display: grid; gap: 12px; }
.strip { display: grid; grid-template-columns: repeat(12, minmax(0, 1fr)); gap: 6px; margin-top: 14px; }
.strip img { width: 100%; height: auto; display: block; image-rendering: pixelated; border: 3px solid #fff; }
.strip .hit { border-color: #007a5e; }
.lesion { fill: none; stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.on-slide .lesion { stroke: #007a5e; }
.on-map .lesion { stroke: #35f0d0; }
.window { fill: none; stroke-width: 1.1; stroke-dasharray: 5 3; vector-effect: non-scaling-stroke;
  stroke: #1d2733; }
.on-map .window { stroke: #fff; }
.colours { display: flex; align-items: center; gap: 8px; color: var(--muted); font-size: .84rem;
  margin-top: 6px; }
.colours img { flex: 1; height: 10px; min-width: 60px; border-radius: 2px; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 0 16px; margin: 10px 0; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; }
details[open] { padding-bottom: 14px; }
pre { overflow-x: auto; background: var(--pale); border-radius: 6px; padding: 12px 14px; font-size: .84rem;
  line-height: 1.45; }
.settings { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px;
  margin: 4px 0 14px; font-size: .92rem; }
.settings dt { color: var(--muted); }
.settings dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .86rem; padding-top: 32px; padding-bottom: 48px; }
@media (max-width: 700px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 22px; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 40px; }
  .lead { font-size: 1.02rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .cards dd { font-size: 1.4rem; }
  .numbers td, .numbers th { padding: 6px 8px; }
  .views, .views.two { grid-template-columns: minmax(0, 1fr); }
  .closeups { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .strip { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  table { font-size: .8rem; }
  th, td { padding: 6px 3px; }
  .bags th:first-child { min-width: 5.5em; }
  .bags td:last-child, .bags th:last-child { padding-right: 0; }
  details { padding: 0 8px; }
  .settings { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .settings dd { margin-bottom: 6px; }
}
@media print {
  html { font-size: 9pt; }
  h2 { margin-top: 26px; }
  .slide { break-inside: avoid; margin: 14px 0 20px; }
  h2 + p, .facts { break-after: avoid; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, .cards div, .note, tr { break-inside: avoid; }
  .charts { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .views { grid-template-columns: minmax(0, 5fr) minmax(0, 5fr) minmax(0, 2.42fr); }
  details::details-content { content-visibility: visible; height: auto; }
  .numbers td { white-space: normal; }
  .scroll { overflow: visible; background: none; }
  .confusion th, .confusion td { padding: 4px 2px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
