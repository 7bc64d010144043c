"""The look of the report: one style sheet for screens of any width, light or dark as the reader's system asks."""

STYLE = """
:root {
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2126; --quiet: #646b75; --line: #e2dfd8; --grid: #eceae4;
  --own: #2563c9; --other: #c9541b; --mean: #12826f; --none: #7b7f87;
  --bare: #7d4fb3; --gain: #1d7a48; --loss: #b93131;
  --warn: #fff3d6; --warn-ink: #6b4a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e8e6e1; --quiet: #9aa1ab; --line: #30363e; --grid: #272c33;
    --own: #74a8ff; --other: #ff9a63; --mean: #4fcbb3; --none: #a3a8b1;
    --bare: #c39bf0; --gain: #5fd08f; --loss: #ff8080;
    --warn: #3b2f10; --warn-ink: #ffdf8f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: clamp(1.4rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.2rem; margin: 0 0 6px; }
p { margin: 0 0 12px; }
section { margin-top: 34px; min-width: 0; }
section > p { color: var(--quiet); max-width: 75ch; }
code { font: 0.88em/1.4 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.eyebrow { color: var(--quiet); font-size: 0.85rem; letter-spacing: 0.04em; margin: 0 0 4px; }
.quiet { color: var(--quiet); font-size: 0.88rem; }
.warning { background: var(--warn); color: var(--warn-ink); padding: 9px 14px; border-radius: 8px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile span { display: block; color: var(--quiet); font-size: 0.88rem; }
.tile strong { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.tile.gain strong, b.gain { color: var(--gain); }
.tile.loss strong, b.loss { color: var(--loss); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 0 32px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 13px; text-anchor: middle; font-family: inherit; }
svg text.end { text-anchor: end; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--line); }
svg .zero { stroke: var(--quiet); stroke-dasharray: 4 3; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; }
svg .line.train { stroke-width: 1.3; opacity: 0.75; }
svg .whisker { stroke: currentColor; stroke-width: 2; }
svg .dot, svg .point { fill: currentColor; }
svg .point { stroke: var(--card); stroke-width: 0.8; }
.own, .held-out { color: var(--own); } .other { color: var(--other); } .mean { color: var(--mean); }
.bare { color: var(--bare); } .none, .train { color: var(--none); }
svg .gain, i.gain { color: var(--gain); } svg .loss, i.loss { color: var(--loss); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 6px 8px 2px; font-size: 0.88rem; }
.legend i, .kind i {
  display: inline-block; width: 10px; height: 10px; border-radius: 50%; background: currentColor; margin-right: 6px;
}
.kind { white-space: nowrap; }
.kind i { color: var(--none); } .kind i.own { color: var(--own); } .kind i.other { color: var(--other); }
.kind i.bare { color: var(--bare); } .kind i.mean { color: var(--mean); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.94rem; }
th { text-align: left; color: var(--quiet); font-weight: 500; white-space: nowrap; }
.range { color: var(--quiet); font-size: 0.92em; white-space: nowrap; }
b.open { font-weight: 400; }
th, td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.wide:has(thead) td { white-space: nowrap; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--quiet); }
article {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; margin-top: 12px;
}
.ask { font-weight: 600; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 16px; margin: 0 0 10px; }
dt { color: var(--quiet); } dd { margin: 0; white-space: pre-wrap; }
.heard { list-style: none; margin: 0; padding: 0; }
.heard li { padding: 6px 0; }
.heard p { margin: 0; }
.bar { height: 6px; border-radius: 3px; background: var(--grid); margin-bottom: 5px; }
.bar i { display: block; height: 6px; border-radius: 3px; background: var(--own); }
@media (max-width: 560px) {
  main { padding: 18px 14px 40px; }
  table { font-size: 0.86rem; }
  .range { display: block; }
  svg text { font-size: 15px; }
  th, td { padding-right: 10px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""
