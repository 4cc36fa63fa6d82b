"use strict";
// The browsable list of answers. What is shown is named by the location's hash and nothing else, so
// that every view is a link: #filter=wrong&subject=Algebra&level=5&rule=number&find=text&page=2.
//
// Texts are a model's. They enter the page as text nodes, or as MathML that Temml builds node by
// node; never as markup.

const PER_PAGE = 10;

const right = (row) => row.verdict === "equal";
const FILTERS = {
  wrong: ["wrong", (row) => !right(row) && !["no_answer", "not_graded"].includes(row.verdict)],
  no_answer: ["no answer", (row) => row.verdict === "no_answer"],
  right: ["right", right],
  all: ["all", () => true],
  truncated: ["truncated", (row) => row.truncated],
  disputed: ["disputed", (row) => row.disputed],
  flipped: ["flipped", (row) => row.other],
  boxes: ["boxes differ", (row) => row.boxes_differ],
};
const ALWAYS = ["wrong", "no_answer", "right", "all"];
// Of each row, what can be chosen from a list. Unless another sample is chosen, the answers are those
// that the counts above are of: the greedy ones where there are any.
const FACETS = {
  subject: (row) => row.problem.subject,
  level: (row) => row.problem.level,
  verdict: (row) => row.verdict,
  rule: (row) => row.rule,
  sample: (row) => row.sample,
};
// What a narrow window shows where it is asked for.
const MORE = ["level", "rule", "sample", "find", "source"];
const WIDE = matchMedia("(min-width: 40rem)");

// --- text with mathematics ----------------------------------------------------------------------

// The bounds keep a response of a thousand opened formulas linear.
const FORMULA = 3000;
const BODY = `[^]{1,${FORMULA}}?`;
const ENVIRONMENT = "(?:align|alignat|eqnarray|equation|flalign|gather|multline)\\*?";
const PIECES = new RegExp(
  [
    "(?<code>```[^]*?(?:```|$)|\\[asy\\][^]*?(?:\\[/asy\\]|$))",
    `(?<environment>\\\\begin\\{(?<name>${ENVIRONMENT})\\}${BODY}\\\\end\\{\\k<name>\\})`,
    `\\$\\$(?<dollars>${BODY})\\$\\$`,
    `(?<!\\\\)\\\\\\[(?<brackets>${BODY})\\\\\\]`,
    `(?<!\\\\)\\\\\\((?<parentheses>${BODY})\\\\\\)`,
    `(?<!\\\\)\\$(?<inline>(?:\\\\[^]|[^\\\\$\\n]|\\n(?!\\s*\\n)){1,${FORMULA}})\\$(?!\\d)`,
    "(?<box>\\\\boxed\\{(?:[^{}]|\\{(?:[^{}]|\\{[^{}]{0,300}\\}){0,300}\\}){1,300}\\})",
  ].join("|"),
  "g",
);
// "$5 more than $" is prose; "$x$" and "$ x $" are formulas.
const lopsided = (formula) => /^\s/.test(formula) !== /\s$/.test(formula);
// A formula that defines macros could be made to grow without end.
const DEFINES = /\\(?:[egx]?def|let|futurelet|global|long|(?:re)?newcommand|providecommand)\b/;

/** Nodes that show `text`, its formulas typeset where they can be and `typeset` asks for it. */
function rich(text, typeset) {
  if (!typeset) return [document.createTextNode(text)];
  const nodes = [];
  let shown = 0;
  let afterBlock = false;
  const prose = (end, beforeBlock) => {
    let between = text.slice(shown, end).replaceAll("\\$", "$");
    if (afterBlock) between = between.trimStart();
    nodes.push(document.createTextNode(beforeBlock ? between.trimEnd() : between));
  };
  PIECES.lastIndex = 0;
  for (let piece; (piece = PIECES.exec(text)); ) {
    const { code, environment, dollars, brackets, parentheses, inline, box } = piece.groups;
    if (inline !== undefined && lopsided(inline)) {
      PIECES.lastIndex = piece.index + 1;
      continue;
    }
    const display = environment ?? dollars ?? brackets;
    const block = (code ?? display) !== undefined;
    prose(piece.index, block);
    const formula = !code && math(display ?? parentheses ?? inline ?? box, display !== undefined);
    nodes.push(formula || element(block ? "code" : "span", {}, piece[0]));
    shown = PIECES.lastIndex;
    afterBlock = block;
  }
  prose(text.length, false);
  return nodes;
}

// Some models escape twice: "2\\cdot3" would be two lines, "2" and "cdot3".
const escapedTwice = (formula) => /\\\\[A-Za-z]/.test(formula) && !/(?<!\\)\\begin\b/.test(formula);

/** MathML of a formula, or null where it cannot be typeset. */
function math(source, display) {
  if (source.length > FORMULA || DEFINES.test(source) || escapedTwice(source)) return null;
  const box = element("span", { className: display ? "display" : "inline", title: source });
  const settings = { displayMode: display, throwOnError: true, maxSize: [100, 100], maxExpand: 500 };
  try {
    temml.render(source, box, settings);
  } catch {
    return null;
  }
  return box;
}

// Answers are formulas without delimiters, or words.
const WORDS = /[A-Za-z]{2,}[\s,.]+[A-Za-z]{2,}/;

/** An answer, typeset where it can be, and its source, which is what was graded. */
function answer(text, typeset) {
  if (text === null || text === undefined) return [element("p", { className: "dim" }, "none")];
  const words = WORDS.test(text.replace(/\\text\w*\s*\{[^{}]*\}|\\[A-Za-z]+/g, ""));
  const formula = typeset && !words && math(text.replace(/^\$+|\$+$/g, ""), true);
  const source = element("p", {}, element("code", {}, text));
  return formula ? [formula, source] : [source];
}

// --- one answer ---------------------------------------------------------------------------------

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function labelled(label, ...children) {
  return element("div", {}, element("h3", {}, label), ...children);
}

const named = (verdict) => (verdict === "equal" ? "right" : verdict.replaceAll("_", " "));

function badge(text, kind = "") {
  return element("span", { className: `badge ${kind}` }, text);
}

function card(row, typeset) {
  const { id, text, gold, solution, subject, level } = row.problem;
  const facts = [
    row.rule,
    subject,
    /^\d/.test(level) ? `level ${level}` : level,
    row.sample > 0 && `sample ${row.sample}`,
    row.drawn,
    row.tokens !== undefined && `${row.tokens.toLocaleString("en")} tokens`,
  ].filter(Boolean);
  const head = element(
    "header",
    {},
    badge(named(row.verdict), right(row) ? "right" : "wrong"),
    element("b", {}, id),
    element("bdi", { className: "dim" }, facts.join(" · ")),
  );
  if (row.truncated) head.append(badge("truncated"));
  if (row.disputed) head.append(badge(`math-verify alone: ${named(row.second)}`));
  if (row.other) head.append(badge(`the other run: ${named(row.other.verdict)}`));
  if (row.boxes_differ) head.append(badge("boxes differ"));
  if (row.problem.defect) head.append(badge(`gold: ${row.problem.defect}`));
  const made = element(
    "article",
    {},
    head,
    element(
      "div",
      { className: "pair answers" },
      labelled("Gold answer", ...answer(gold, typeset)),
      labelled("Extracted answer", ...answer(row.extracted, typeset)),
    ),
  );
  if (text) {
    const problem = element("div", { className: "prose problem" }, ...rich(text, typeset));
    made.append(labelled("Problem", problem));
  }
  const said = labelled("Response", response(row.response, typeset));
  if (solution) {
    const gold = labelled("Gold solution", response(solution, typeset));
    made.append(element("div", { className: "pair" }, gold, said));
  } else made.append(said);
  if (row.other) {
    const { extracted, response: said, rule } = row.other;
    made.append(
      element(
        "details",
        {},
        element("summary", {}, "The other run ", element("span", {}, rule ?? "")),
        ...answer(extracted, typeset),
        response(said, typeset),
      ),
    );
  }
  return made;
}

function response(text, typeset) {
  return element("pre", { className: "prose" }, ...rich(text ?? "", typeset));
}

// --- the list -----------------------------------------------------------------------------------

let DATA;
const place = (id) => document.getElementById(id);
const asked = () => new URLSearchParams(location.hash.slice(1));

/** The hash that shows what is shown now, with `changes`; an empty value takes a key away. */
function link(changes) {
  const query = asked();
  query.delete("page");
  for (const [key, value] of Object.entries(changes)) {
    if (value === "") query.delete(key);
    else query.set(key, value);
  }
  return `#${query}`;
}

/** What is chosen of a facet: a value, or "any". */
const chosen = (query, key) => query.get(key) ?? (key === "sample" ? DATA.sample : "any");

/** Whether a row has all that `query` asks for, its filter apart. */
function matching(query) {
  const wanted = Object.entries(FACETS)
    .map(([key, of]) => [of, chosen(query, key)])
    .filter(([, value]) => value !== "any");
  const find = (query.get("find") ?? "").toLowerCase();
  const has = (text) => text?.toLowerCase().includes(find);
  return (row) =>
    wanted.every(([of, value]) => String(of(row)) === value) &&
    (!find ||
      [row.problem.id, row.problem.text, row.problem.gold, row.extracted, row.response].some(has));
}

function draw() {
  const query = asked();
  const rows = DATA.rows.filter(matching(query));
  const filter = Object.hasOwn(FILTERS, query.get("filter")) ? query.get("filter") : DATA.filter;
  place("filters").replaceChildren(
    ...Object.entries(FILTERS)
      .filter(([key, [, test]]) => ALWAYS.includes(key) || key === filter || rows.some(test))
      .map(([key, [label, test]]) => {
        const count = rows.filter(test).length.toLocaleString("en");
        const button = element("a", { href: link({ filter: key }) }, `${label} `);
        button.append(element("span", {}, count));
        if (key === filter) button.ariaCurrent = "true";
        return button;
      }),
  );
  const chip = place("filters").querySelector("[aria-current]");
  place("filters").scrollLeft = chip.offsetLeft - place("filters").offsetLeft;
  for (const key of Object.keys(FACETS)) place(key).value = chosen(query, key);
  if (WIDE.matches || MORE.some((key) => query.has(key))) place("more").open = true;
  if (document.activeElement !== place("find")) place("find").value = query.get("find") ?? "";
  place("source").checked = query.has("source");
  list(rows.filter(FILTERS[filter][1]), query);
}

// A card is filled when it comes near the window: long responses have thousands of formulas.
const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      target.replaceWith(card(target.row, !asked().has("source")));
    }
  },
  { rootMargin: "600px" },
);

function list(rows, query) {
  const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
  const page = Math.min(pages, Math.max(1, Number.parseInt(query.get("page"), 10) || 1));
  const start = (page - 1) * PER_PAGE;
  const shown = rows.slice(start, start + PER_PAGE);
  near.disconnect();
  place("answers").replaceChildren(
    ...shown.map((row) => element("article", { className: "waiting", row })),
  );
  for (const waiting of place("answers").children) near.observe(waiting);
  const number = (count) => count.toLocaleString("en");
  const span = `${number(start + 1)} to ${number(start + shown.length)} of ${number(rows.length)}`;
  for (const pager of document.querySelectorAll("nav.pager")) {
    const step = (to, label) =>
      to < 1 || to > pages ? label : element("a", { href: link({ page: to }) }, label);
    pager.replaceChildren(
      step(page - 1, "previous"),
      element("span", {}, rows.length ? span : "no such answer"),
      step(page + 1, "next"),
    );
  }
}

function choices(key, of) {
  const values = [...new Set(DATA.rows.map(of))].filter((value) => value !== undefined);
  values.sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
  place(key).append(...values.map((value) => element("option", { value }, String(value))));
  place(key).addEventListener("change", (event) => {
    location.hash = link({ [key]: event.target.value });
  });
  place(key).parentElement.hidden = values.length < 2;
}

function listen() {
  let waiting;
  place("find").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => location.replace(link({ find: event.target.value })), 200);
  });
  place("source").addEventListener("change", (event) => {
    location.hash = link({ source: event.target.checked ? "1" : "" });
  });
  addEventListener("hashchange", (event) => {
    draw();
    if (new URL(event.newURL).hash !== new URL(event.oldURL).hash) reveal();
  });
}

/** Bring the list's top into view where the window is below it, or far above. */
function reveal() {
  const top = place("browse").getBoundingClientRect().top;
  if (top < 0 || top > innerHeight / 2) place("browse").scrollIntoView();
}

/** The rows, which travel as base64 of gzipped JSON. */
async function unpack() {
  const packed = Uint8Array.from(atob(place("rows").textContent), (char) => char.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(unpacked).json();
  for (const row of data.rows) row.problem = data.problems[row.problem];
  // what most come to see
  data.filter = data.rows.some(FILTERS.wrong[1]) ? "wrong" : "all";
  return data;
}

async function start() {
  try {
    DATA = await unpack();
    for (const [key, of] of Object.entries(FACETS)) choices(key, of);
    listen();
    draw();
    if (location.hash.length > 1) place("browse").scrollIntoView();
  } catch (error) {
    place("answers").textContent = `The answers cannot be shown here (${error}). `
      + "Needed is Chromium 94, Firefox 113, Safari 16.4 or later.";
  }
  document.body.dataset.ready = "";
}

start();
