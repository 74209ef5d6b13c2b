"""How the page looks, on the screen and printed."""

STYLE = """
:root { --ink: #1c2330; --pale: #566070; --line: #d9dde3; --wash: #f5f7f9; --blue: #0b5394;
  --warn: #8a4b00; --warn-wash: #fff6e5; --bad: #a3161a; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.page { max-width: 74rem; margin: 0 auto; padding: 0 2rem 4rem; }
header { border-bottom: 1px solid var(--line); padding: 2.6rem 0 1.4rem; }
.kicker { margin: 0 0 .3rem; color: var(--pale); font-size: .82rem; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3.2rem 0 .9rem; font-size: 1.35rem; line-height: 1.3; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1.05rem; }
p, ul, dl { max-width: 48rem; }
p { margin: .6rem 0; }
.lead { color: var(--pale); margin: .5rem 0 0; }
a { color: var(--blue); }
nav ol { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; list-style: none; padding: 0;
  margin: 1.1rem 0 0; font-size: .9rem; }
.banner { background: var(--bad); color: #fff; font-weight: 700; font-size: 1.15rem;
  text-align: center; padding: .8rem 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1rem;
  margin: 1.6rem 0 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.1rem; }
.card:first-child { background: var(--wash); grid-column: span 2; }
.card b { display: block; font-size: 2rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.card:first-child b { font-size: 3rem; color: var(--blue); }
.card span { display: block; color: var(--pale); font-size: .88rem; margin-top: .25rem; }
.watch { border-left: 5px solid #e69f00; background: var(--warn-wash); padding: .7rem 1.2rem;
  margin: 1.4rem 0; }
.watch h2 { margin: .2rem 0 .4rem; font-size: 1.05rem; color: var(--warn); }
.watch ul { margin: .2rem 0; padding-left: 1.2rem; max-width: none; }
figure { margin: 2.6rem 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: .4rem; }
figcaption { max-width: 52rem; margin-top: .8rem; color: #333c49; font-size: .95rem; }
figcaption small { display: block; color: var(--pale); margin-top: .3rem; }
.unseen { position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
.none { border: 1px dashed #9aa3af; border-radius: .4rem; padding: 1.4rem; color: var(--pale);
  max-width: 52rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  margin: .8rem 0; }
caption { text-align: left; color: var(--pale); padding-bottom: .4rem; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e9ecf0; }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.chip { display: inline-block; min-width: 2.2em; padding: 0 .35em; border-radius: .25em;
  text-align: center; font-weight: 600; }
.bar { display: inline-block; width: 6.5rem; height: .72em; background: #e6eaef;
  border-radius: .2em; overflow: hidden; vertical-align: -.04em; margin-right: .5em; }
.bar i { display: block; height: 100%; background: #2171b5; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; font-size: .92rem; }
dt { color: var(--pale); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .92em; }
@media (max-width: 40rem) { .page { padding: 0 1rem 3rem; } .card:first-child { grid-column: auto; }
  dl { grid-template-columns: 1fr; } }
@media print {
  @page { size: A4; margin: 14mm; }
  html { font-size: 9.5pt; } body { font-size: 1rem; }
  .page { max-width: none; padding: 0; } nav { display: none; }
  header { padding-top: 0; } h2 { break-after: avoid; margin-top: 1.6rem; }
  figure { margin: 1.2rem 0; } figure img { border: 0; max-height: 235mm; width: auto; }
  .banner, .card, .watch, .chip, .bar, .bar i { print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  .card b { font-size: 1.3rem; } .card:first-child b { font-size: 1.8rem; }
  tr { break-inside: avoid; } thead { display: table-header-group; } .table { overflow: visible; }
  a { color: inherit; text-decoration: none; }
}
"""
