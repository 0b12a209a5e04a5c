"""Style sheet of the HTML report; system fonts only, nothing is loaded."""

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --soft: #5a6475; --line: #dde2ea; --good: #00704f; --bad: #b34700; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
header, section { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.3rem;
  margin: 0 0 1rem; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .2rem 0 .6rem; padding-left: .8rem; border-left: .4rem solid; }
h2 { font-size: 1.15rem; margin: 0 0 .7rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
h4 { margin: 0 0 .3rem; font-size: .85rem; color: var(--soft); }
.kicker, .meta, .note, small { color: var(--soft); font-size: .87rem; }
.kicker { margin: 0; }
small { display: block; font-weight: normal; }
.good { color: var(--good); } .bad { color: var(--bad); } .mixed { color: #8a5a00; } .neutral { color: var(--soft); }
.missing { color: var(--soft); font-style: italic; }
.warning { background: #fff6e5; border-left: .3rem solid #e69f00; padding: .5rem .8rem; }
img { max-width: 100%; height: auto; display: block; margin: .6rem auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; margin: .4rem 0; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
td span { white-space: nowrap; font-weight: 600; }
tbody th { font-weight: 500; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem; margin: .4rem 0; }
summary { cursor: pointer; font-weight: 500; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin-top: .6rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; padding: .6rem; border-radius: .4rem;
  font: .83rem/1.5 ui-monospace, monospace; margin: 0; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } main { padding: .5rem; } }
"""
