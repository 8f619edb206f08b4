"""The style of the report's page: its whole CSS, inline, so that the page asks nothing of any network."""

STYLE = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1d2024; --muted: #6b7079; --rule: #e3e4e7;
  --pretrained: #14708a; --second: #6a4c93; --third: #4d7c0f; --fourth: #a3195b; --fifth: #8a6d14; --sixth: #3b5bb5;
  --scratch: #c4632d; --good: #1d7a4a; --bad: #b3261e; --tint: #f4f5f4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1b1e22; --ink: #e6e7e9; --muted: #9aa0a9; --rule: #32363c;
    --pretrained: #5fbcd3; --second: #b79ae0; --third: #a3c95f; --fourth: #ee7fae; --fifth: #d9bb62; --sixth: #8fa8f0;
    --scratch: #e89a6b; --good: #6cc798; --bad: #ff8a80; --tint: #202328;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 var(--sans); -webkit-text-size-adjust: 100%;
}
main { max-width: 1120px; margin: 0 auto; padding: 56px 24px 96px; }
header { margin-bottom: 40px; }
.kicker { color: var(--muted); font-size: 13px; letter-spacing: .02em; margin: 0 0 6px; }
h1 { font-size: 34px; line-height: 1.18; font-weight: 650; letter-spacing: -.018em; margin: 0 0 14px;
  text-wrap: balance; }
h2 { font-size: 21px; font-weight: 620; letter-spacing: -.01em; margin: 64px 0 6px; }
h3 { font-size: 15px; font-weight: 600; margin: 0; }
p { margin: 0 0 12px; max-width: 70ch; }
.lead { font-size: 18px; color: var(--ink); }
.fact em { font-style: normal; color: var(--bad); }
.below { margin-top: 14px; }
.note, .lead + .note { color: var(--muted); font-size: 14px; }
code { font: 13px/1.5 var(--mono); overflow-wrap: anywhere; }
pre {
  font: 13px/1.55 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--tint); border-radius: 8px; padding: 12px 14px; margin: 0;
}
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 32px 0 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
.fact { background: var(--card); padding: 16px 18px; }
.fact b { display: block; font-size: 26px; font-weight: 600; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.fact span { color: var(--muted); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 16px;
  margin-top: 18px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px 10px; }
figcaption { font-size: 15px; font-weight: 600; margin-bottom: 6px; }
figcaption span { color: var(--muted); font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; }
.wide { margin-top: 18px; overflow-x: auto; }
figure.wide svg { min-width: 560px; }
.key { display: flex; gap: 20px; flex-wrap: wrap; font-size: 14px; color: var(--muted); margin-top: 14px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.scroll { overflow-x: auto; margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 16px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.first td { border-top: 1px solid var(--muted); }
a { color: inherit; text-decoration: underline; text-decoration-color: var(--rule); text-underline-offset: 3px; }
a:hover { text-decoration-color: currentColor; }
:target { outline: 2px solid var(--pretrained); outline-offset: 3px; border-radius: 4px; }
small { font-size: 12px; color: var(--muted); }
.cell td code { white-space: nowrap; }
.narrow th { white-space: normal; vertical-align: bottom; }
td small { display: block; line-height: 1.2; }
h3.sub { margin: 30px 0 0; }
h4 { font-size: 14px; font-weight: 600; margin: 22px 0 0; }
td.t { font-weight: 600; white-space: nowrap; }
.half { color: var(--muted); }
.wins, .loses, .unclear { white-space: nowrap; }
.wins { color: var(--good); } .loses { color: var(--bad); } .unclear { color: var(--muted); }
.failed, .failed td { color: var(--bad); }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--muted); font-size: 14px; padding: 4px 0; }
.cell { border-left: 2px solid var(--rule); padding-left: 18px; margin: 6px 0 26px; }
.cell ul { font-size: 14px; margin: 6px 0; }
.matrix th.name { max-width: 64px; overflow: hidden; text-overflow: ellipsis; }
.matrix th, .matrix td { padding: 4px 6px; font-size: 13px; }
.hit, .miss { text-align: right; background: color-mix(in srgb, var(--of) calc(var(--s) * 1%), transparent); }
.hit { --of: var(--good); } .miss { --of: var(--bad); }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 6px 18px; margin-top: 12px;
  font-size: 13px; }
.class { position: relative; padding: 1px 6px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
  font-variant-numeric: tabular-nums; }
.class i { position: absolute; inset: 0 auto 0 0; background: var(--pretrained); opacity: .14; }
.class b { font-weight: 500; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px; margin-top: 12px; }
.pictures figure { padding: 10px 12px; }
.pictures p { margin: 0; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.pictures img { display: block; margin: 8px auto; max-width: 100%; }
.pictures img[src^="data:image/png"] { image-rendering: pixelated; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 8px 24px; margin: 18px 0 0;
  font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 620px) {
  main { padding: 32px 16px 64px; } h1 { font-size: 27px; } h2 { margin-top: 48px; }
  dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; }
  th, td { padding-right: 12px; }
}
@media print {
  :root { color-scheme: light; } main { max-width: none; padding: 0; } body { font-size: 12px; }
  figure, .fact, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
}
"""
