// Joins the parts of the page: the form, two panels, their difference and the gallery.

import { apiKey, listModels } from "./api.js";
import { Difference } from "./difference.js";
import { draw, sentence } from "./drawing.js";
import { Fields, nameOf } from "./fields.js";
import { Gallery } from "./gallery.js";
import { Panel } from "./panel.js";
import { randomSeed, requestBody, streamed } from "./request.js";

const byId = (id) => document.getElementById(id);
const form = byId("form");
const seed = byId("seed");
const panels = { left: new Panel("left", compare), right: new Panel("right", compare) };
byId("difference").before(panels.left.root, panels.right.root);
const difference = new Difference();
const fields = new Fields(form);
const gallery = new Gallery(restore);

/** Controller of the run that is under way. */
let running = null;
/** Whether a run was refused for want of a key, and shall begin once there is one. */
let wantsKey = false;

function say(text) {
  byId("status").textContent = text;
}

/** Sides that are shown, by their panel's name. */
function sides(values) {
  return values.view === "two" ? ["left", "right"] : ["right"];
}

function showView(two) {
  panels.left.root.hidden = byId("difference").hidden = !two;
  byId("pictures").dataset.view = two ? "two" : "one";
  if (!running) showTitles();
}

function showTitles(values = fields.read()) {
  const rules = fields.model?.emag.guidances;
  if (!rules) return;
  for (const side of ["left", "right"]) panels[side].title(values[side], rules[values[side]]);
  difference.title(nameOf(values.left), nameOf(values.right));
}

/** Frames as wide and high as the pictures; beyond 2 : 1 the rest stays empty, so that the page stays a page. */
function showShape({ width, height }) {
  const shape = Math.min(2, Math.max(0.5, width / height));
  if (Number.isFinite(shape)) byId("pictures").style.setProperty("--shape", shape);
}

/** Once both sides show the same step, show how they differ. */
function compare() {
  const { left, right } = { left: panels.left.shown, right: panels.right.shown };
  if (left && right && left.step === right.step && left.final === right.final) {
    difference.compare(left.image, right.image);
  }
}

async function loadModels() {
  try {
    const models = await listModels();
    byId("key-form").hidden = true;
    fields.setModels(models);
    showTitles();
    showShape(fields.read());
    say("Press Generate to draw the same seed with both guidances.");
  } catch (error) {
    if (error.status === 401) askForKey();
    else say(sentence(error.message));
  }
}

function askForKey() {
  const refused = apiKey.get() !== "";
  byId("key-form").hidden = false;
  byId("key-form").dataset.refused = refused;
  byId("key").setAttribute("aria-invalid", refused);
  byId("key-hint").textContent = refused
    ? "The server does not know this key. See whether it is whole, and try again."
    : "This server asks for a key. It is kept until you close this tab.";
  byId("key").focus();
  say(refused ? "The server does not know this key." : "The server asks for an API key.");
}

async function useKey(event) {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  await loadModels();
  if (!byId("key-form").hidden) return;
  byId("generate").focus();
  if (wantsKey) generate();
}

async function generate() {
  if (running) return;
  if (!fields.model) await loadModels();
  if (!fields.model) {
    if (byId("key-form").hidden) showPicturesOnPhone(); // where it says why there are no models
    return;
  }
  if (!fields.check()) return;
  const values = fields.read();
  values.seed ||= randomSeed();
  running = new AbortController();
  wantsKey = false;
  showBusy(true);
  showTitles(values);
  showShape(values);
  difference.clear("Until both sides have a picture");
  say(`Drawing with seed ${values.seed}.`);
  showPicturesOnPhone();
  const began = performance.now();
  const outcomes = await Promise.all(sides(values).map((side) => drawSide(side, values, running.signal)));
  const cancelled = running.signal.aborted;
  running = null;
  showBusy(false);
  sayOutcome(outcomes, cancelled, (performance.now() - began) / 1000);
  const results = outcomes.filter((outcome) => outcome.body);
  if (results.length) gallery.add({ values, results });
}

/** Draw one side; what went wrong is returned, so that the other side goes on. */
async function drawSide(side, values, signal) {
  const panel = panels[side];
  const body = requestBody(values, values[side]);
  const stream = streamed(body, values, fields.model.emag.previews);
  const onBusy = (why) => say(why ?? `Drawing with seed ${values.seed}.`);
  panel.clear("");
  try {
    const result = { side, ...(await draw(panel, { body, stream, onBusy }, signal)) };
    panel.finish(result);
    return result;
  } catch (error) {
    if (signal.aborted) panel.cancelled();
    else panel.fail(sentence(error.message));
    return { error };
  }
}

function sayOutcome(outcomes, cancelled, seconds) {
  const errors = cancelled ? [] : outcomes.map(({ error }) => error).filter(Boolean);
  const [error] = errors;
  if (cancelled) {
    say("Cancelled.");
  } else if (!error) {
    say(`Finished in ${seconds.toFixed(1)} s.`);
  } else if (error.status === 401) {
    wantsKey = true;
    askForKey();
  } else {
    const text = sentence(error.message);
    const marked = error.param && fields.problem(error.param, text);
    say(marked ? "Not drawn: see the marked field." : text);
  }
  if (errors.length || cancelled) {
    const none = cancelled ? "Cancelled" : "No difference: a picture is missing";
    if (!(panels.left.shown && panels.right.shown)) difference.clear(none);
  }
}

function showBusy(busy) {
  const [button, cancel] = [byId("generate"), byId("cancel")];
  button.setAttribute("aria-disabled", String(busy));
  if (!busy && document.activeElement === cancel) button.focus(); // a disabled button would lose the focus
  cancel.disabled = !busy;
  byId("pictures").setAttribute("aria-busy", String(busy));
}

/** Below 700 pixels the pictures are under the form. */
function showPicturesOnPhone() {
  if (!matchMedia("(max-width: 700px)").matches) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("results").scrollIntoView({ behavior: still ? "instant" : "smooth" });
}

/** Show an earlier run, with what was filled in for it. */
function restore({ values, results }) {
  if (running) {
    say("A run is under way; cancel it, or wait until it is finished.");
    return false;
  }
  fields.write(values);
  showTitles(values);
  showShape(values);
  difference.clear("No difference: a picture is missing");
  for (const panel of Object.values(panels)) panel.clear("Not drawn");
  for (const result of results) panels[result.side].finish(result);
  say(`Back to seed ${values.seed}.`);
  return true;
}

function pressed(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
  if (event.key === "Escape" && !byId("copy-dialog").open) running?.abort();
}

form.addEventListener("view", ({ detail }) => showView(detail.two));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.addEventListener("change", ({ target }) => {
  if (["left", "right", "model"].includes(target.name) && !running) showTitles();
});
byId("more").addEventListener("toggle", ({ target }) => {
  // What was unfolded lies below the edge; an error that unfolds it has its own place to go to.
  if (target.open && document.activeElement === target.firstElementChild) target.scrollIntoView({ block: "nearest" });
});
byId("cancel").addEventListener("click", () => running?.abort());
byId("random-seed").addEventListener("click", () => {
  seed.value = randomSeed();
});
byId("key-form").addEventListener("submit", useKey);
document.addEventListener("keydown", pressed);
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("generate-keys").textContent = "⌘ Enter";
for (const [side, guidance] of [["left", "cfg"], ["right", "emag"]]) {
  panels[side].title(guidance, "");
  panels[side].clear("A picture will appear here");
}
loadModels();
