// Earlier runs of this page, kept in memory until it is closed.

import { nameOf } from "./fields.js";

/** Older runs make room, so that a long session does not fill the memory. */
const MOST = 60;
const MOVES = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

/** The strip of earlier runs, the newest first. One of them is a tab stop; arrow keys reach the others. */
export class Gallery {
  #section = document.getElementById("gallery");
  #list = document.getElementById("gallery-list");
  #runs = new Map();
  #restore;

  /** @param {(run: object) => boolean} restore Shows a run again; false if it cannot now. */
  constructor(restore) {
    this.#restore = restore;
    this.#list.addEventListener("keydown", (event) => this.#move(event));
    this.#list.addEventListener("focusin", (event) => this.#tabStop(event.target.closest("button")));
  }

  /**
   * Remember a run.
   *
   * @param {{values: object, results: object[]}} run What the form said, and the pictures.
   */
  add(run) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "run" });
    button.append(thumbnails(run), caption(run));
    button.setAttribute("aria-label", label(run));
    button.addEventListener("click", () => {
      if (this.#restore(run)) this.#mark(button);
    });
    const item = document.createElement("li");
    item.append(button);
    this.#list.prepend(item);
    this.#list.scrollLeft = 0;
    this.#runs.set(button, run);
    this.#section.hidden = false;
    this.#forget();
    this.#mark(button);
    this.#tabStop(button);
  }

  #forget() {
    while (this.#runs.size > MOST) {
      const [button, run] = this.#runs.entries().next().value; // a map keeps the order of arrival
      for (const { url } of run.results) URL.revokeObjectURL(url);
      this.#runs.delete(button);
      button.parentElement.remove();
    }
  }

  #buttons() {
    return [...this.#list.querySelectorAll("button")];
  }

  #mark(shown) {
    for (const button of this.#buttons()) {
      if (button === shown) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  #tabStop(stop) {
    for (const button of this.#buttons()) button.tabIndex = button === stop ? 0 : -1;
  }

  #move(event) {
    const buttons = this.#buttons();
    const last = buttons.length - 1;
    const here = buttons.indexOf(document.activeElement);
    const goal = { Home: 0, End: last }[event.key] ?? here + (MOVES[event.key] ?? NaN);
    if (here < 0 || Number.isNaN(goal)) return;
    event.preventDefault();
    buttons[Math.min(last, Math.max(0, goal))].focus();
  }
}

function thumbnails({ results }) {
  const pair = document.createElement("span");
  pair.className = "thumbnails";
  for (const { url } of results) {
    const image = Object.assign(document.createElement("img"), { src: url, alt: "" });
    image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth <= 256));
    pair.append(image);
  }
  return pair;
}

function caption({ values, results }) {
  const text = document.createElement("span");
  text.className = "run-caption";
  const prompt = Object.assign(document.createElement("span"), { className: "run-prompt" });
  prompt.textContent = values.prompt || "No prompt";
  const facts = Object.assign(document.createElement("span"), { textContent: `Seed ${values.seed}, ${names(results)}` });
  text.append(prompt, facts);
  return text;
}

function names(results) {
  return results.map(({ body }) => nameOf(body.emag.guidance)).join(" and ");
}

function label({ values, results }) {
  return `${values.prompt || "No prompt"}, seed ${values.seed}, ${names(results)}`;
}
