// The form: what a model offers and limits, what is filled in, and which field an error is about.

import { isSeed } from "./request.js";

const CHECKBOXES = "emag.blocks";
const PROMPTS = ["prompt", "negative_prompt"];

/** The form's fields, by the names that the API gives them. */
export class Fields {
  #form;
  #models = [];
  /** The page's own prompt fields, which take text. */
  #texts;
  /** The model's own guidance. */
  #guidance;

  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.#form = form;
    this.#texts = Object.fromEntries(PROMPTS.map((name) => [name, this.#control(name)]));
    this.#control("model").addEventListener("change", () => this.#offer(this.model));
    for (const radio of form.querySelectorAll("[name=view]")) {
      radio.addEventListener("change", () => this.#showView());
    }
    form.addEventListener("input", (event) => unmark(event.target));
    this.#showView();
  }

  /** What the server says about the model that is picked; undefined before it has said anything. */
  get model() {
    return this.#models.find((model) => model.id === this.#control("model").value);
  }

  /** Offer models and the defaults of the first one. */
  setModels(models) {
    this.#models = models;
    document.getElementById("model-picker").hidden = false;
    this.#control("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    this.#offer(this.model);
  }

  /** Everything that is filled in, as text, by the field's name. */
  read() {
    const data = new FormData(this.#form);
    const checked = data.getAll(CHECKBOXES);
    return { ...Object.fromEntries(data), [CHECKBOXES]: checked };
  }

  /** Fill in what {@link read} gave. */
  write(values) {
    this.clearProblems();
    this.#control("model").value = values.model;
    this.#offer(this.model);
    for (const [name, value] of Object.entries(values)) {
      if (name !== CHECKBOXES && this.#control(name)) this.#control(name).value = value;
    }
    for (const box of this.#form.querySelectorAll(`[name="${CHECKBOXES}"]`)) {
      box.checked = values[CHECKBOXES].includes(box.value);
    }
    this.#showView();
  }

  /** Mark what cannot be sent, and put the focus on the first such field. */
  check() {
    this.clearProblems();
    const wrong = [...this.#form.elements].filter((control) => {
      const text = problemOf(control);
      if (text) mark(control, text);
      return Boolean(text);
    });
    reveal(wrong[0]);
    return wrong.length === 0;
  }

  /** Show the server's word on a field; false where the form has no such field. */
  problem(param, text) {
    const place = this.#form.querySelector(`[data-param="${CSS.escape(param)}"], [name="${CSS.escape(param)}"]`);
    if (!place) return false;
    mark(place, text);
    reveal(place);
    return true;
  }

  clearProblems() {
    for (const control of [...this.#form.querySelectorAll("[aria-invalid]")]) unmark(control);
  }

  #control(name) {
    return this.#form.elements.namedItem(name);
  }

  /** Free text, or one of the model's classes: by a name of the list, or by its number. */
  #offerPrompts({ prompt, classes: named }) {
    const classes = named ?? [];
    document.getElementById("classes").replaceChildren(...classes.map((name) => new Option("", name)));
    for (const name of PROMPTS) {
      const [shown, text] = [this.#control(name), this.#texts[name]];
      if (prompt === "class" && shown === text) text.replaceWith(classField(text, classes));
      else if (prompt !== "class" && shown !== text) shown.replaceWith(text);
    }
  }

  #offer({ emag }) {
    this.#offerPrompts(emag);
    const set = { num_inference_steps: emag.steps, width: emag.width, height: emag.height };
    const scales = { guidance_scale: emag.guidance_scale, "emag.scale": emag.emag_scale };
    for (const [name, value] of Object.entries({ ...set, ...scales })) this.#control(name).value = value;
    this.#control("num_inference_steps").max = emag.max_steps;
    const embedded = emag.embedded_guidance;
    this.#control("emag.embedded_guidance").value = embedded ?? "";
    document.getElementById("embedded-field").hidden = embedded == null;
    // Another model's own guidance may be another one: that of a distilled model has no unconditional row.
    const own = { left: emag.guidance === "emag-only" ? "none" : "cfg", right: emag.guidance };
    const kept = this.#guidance === emag.guidance;
    this.#guidance = emag.guidance;
    this.#control("emag.preview_every").disabled = !emag.previews;
    for (const name of ["left", "right"]) {
      const select = this.#control(name);
      const wanted = kept ? select.value : own[name];
      const offered = Object.keys(emag.guidances);
      select.replaceChildren(...offered.map((guidance) => new Option(nameOf(guidance), guidance)));
      select.value = offered.includes(wanted) ? wanted : offered[0];
    }
    document.getElementById("blocks").replaceChildren(...emag.candidates.map(blockBox));
    document.getElementById("model-facts").textContent =
      `${emag.variant}, ${emag.precision}, ${emag.width} × ${emag.height}`;
    this.#showView();
  }

  #showView() {
    const two = this.#control("view").value === "two";
    document.getElementById("left-field").hidden = !two;
    document.getElementById("right-label").textContent = two ? "Right" : "Guidance";
    this.#form.dispatchEvent(new CustomEvent("view", { detail: { two } }));
  }
}

/** A guidance as people write it: EMAG + APG. */
export function nameOf(guidance) {
  return guidance.replace("+", " + ").replace(/\b(emag|cfg|apg|cads)\b/g, (word) => word.toUpperCase());
}

/** A field for a class in place of one for text. */
function classField(text, classes) {
  const field = document.createElement("input");
  Object.assign(field, { id: text.id, name: text.name, autocomplete: "off" });
  field.setAttribute("list", "classes");
  if (text.name === "prompt") field.value = classes[0] ?? "0";
  field.placeholder = text.name === "prompt" ? "A class, or its number" : "No class";
  return field;
}

function blockBox(block) {
  const box = Object.assign(document.createElement("input"), {
    type: "checkbox",
    name: CHECKBOXES,
    value: block,
    id: `block-${block}`,
  });
  const label = Object.assign(document.createElement("label"), { htmlFor: box.id, textContent: block });
  const pair = document.createElement("span");
  pair.append(box, label);
  return pair;
}

function problemOf(control) {
  const { validity, min, max } = control;
  if (control.name === "seed" && control.value !== "" && !isSeed(control.value)) {
    return "Give a whole number from 0 to 9223372036854775807, or leave it empty.";
  }
  if (!validity || control.disabled) return "";
  if (validity.badInput) return "Write a number.";
  if (validity.valueMissing) return "Fill this in.";
  if (!validity.rangeUnderflow && !validity.rangeOverflow) return "";
  if (min && max) return `Give ${min} to ${max}.`;
  return min ? `Give ${min} or more.` : `Give at most ${max}.`;
}

function noteOf(control) {
  return document.getElementById(`${control.id}-problem`);
}

function mark(control, text) {
  unmark(control);
  const note = document.createElement("span");
  Object.assign(note, { id: `${control.id}-problem`, className: "problem-note", textContent: text });
  (control.closest(".pair, .triple") ?? control.parentElement).append(note);
  control.setAttribute("aria-invalid", "true");
  const described = control.getAttribute("aria-describedby");
  control.setAttribute("aria-describedby", [described, note.id].filter(Boolean).join(" "));
}

function unmark(control) {
  const note = noteOf(control);
  if (!note) return;
  const described = control.getAttribute("aria-describedby").split(" ").filter((id) => id !== note.id);
  control.setAttribute("aria-describedby", described.join(" "));
  control.removeAttribute("aria-invalid");
  note.remove();
}

function reveal(control) {
  if (!control) return;
  const folded = control.closest("details");
  if (folded) folded.open = true;
  control.focus();
  noteOf(control)?.scrollIntoView({ block: "nearest" });
}
