// One side of the comparison: its picture, how far it is, what went wrong, and what can be done with it.

import { curlCommand, fileName, pythonProgram } from "./code.js";
import { copyText } from "./copy.js";
import { address, apiKey } from "./api.js";
import { nameOf } from "./fields.js";

/** Up to this many pixels a side, a picture is enlarged with sharp pixels instead of being blurred. */
const SMALL = 256;

/** A panel of the page. Its state, in `data-state`: empty, waiting, running, done, failed or cancelled. */
export class Panel {
  #root;
  #image;
  #step = null;
  #result = null;
  #onPicture;

  /**
   * @param {string} id Of the element.
   * @param {() => void} onPicture Called whenever another picture can be seen.
   */
  constructor(id, onPicture) {
    const template = document.getElementById("panel-template");
    this.#root = template.content.firstElementChild.cloneNode(true);
    this.#root.id = id;
    this.#image = this.#find("img");
    this.#onPicture = onPicture;
    // One press is for both sides: they wait for the same server.
    this.#find(".problem button").addEventListener("click", () => document.dispatchEvent(new Event("retry")));
    this.#find("[data-action=curl]").addEventListener("click", () => this.#copy(curlCommand, "curl command"));
    this.#find("[data-action=python]").addEventListener("click", () => this.#copy(pythonProgram, "Python program"));
  }

  get root() {
    return this.#root;
  }

  /** The picture that is shown and the step it is from; null where none is. */
  get shown() {
    return this.#step === null ? null : { image: this.#image, step: this.#step, final: this.#result !== null };
  }

  /** Say what this side is for. */
  title(guidance, rule) {
    const name = nameOf(guidance);
    this.#root.setAttribute("aria-label", name);
    this.#find("h2").textContent = name;
    this.#find(".panel-rule").textContent = rule;
    this.#find("progress").setAttribute("aria-label", `${name}, steps`);
    this.#find("[data-action=download]").setAttribute("aria-label", `Download PNG, ${name}`);
    this.#find("[data-action=curl]").setAttribute("aria-label", `Copy as curl, ${name}`);
    this.#find("[data-action=python]").setAttribute("aria-label", `Copy as Python, ${name}`);
  }

  /** Forget the picture. */
  clear(text) {
    this.#become("empty");
    this.#step = this.#result = null;
    this.#image.hidden = true;
    this.#image.removeAttribute("src");
    this.#find(".frame-text").textContent = text;
    this.#find(".panel-facts").textContent = "";
    this.#find(".panel-actions").hidden = true;
    this.#progress(0, 1, "");
  }

  /** A request was sent, and nothing is known about it. */
  waiting(text) {
    this.#become("waiting");
    this.#find(".frame-text").textContent = text;
  }

  /** So many steps are done. */
  advance(step, steps) {
    this.#become("running");
    this.#progress(step, steps, `Step ${step} of ${steps}`);
  }

  /** Show what the picture looks like so far. */
  preview({ b64_json, step, steps }) {
    this.advance(step, steps);
    this.#show(`data:image/png;base64,${b64_json}`, step, `Preview after step ${step} of ${steps}`);
  }

  /** Show a finished picture, of this run or an earlier one. */
  finish(result) {
    const { body, url, size, seconds } = result;
    this.#become("done");
    this.#result = result;
    const steps = body.num_inference_steps;
    this.#progress(steps, steps, "");
    this.#find(".panel-facts").textContent = `Seed ${body.seed}, ${size}, ${steps} steps in ${seconds.toFixed(1)} s`;
    Object.assign(this.#find("[data-action=download]"), { href: url, download: fileName(body) });
    this.#find(".panel-actions").hidden = false;
    this.#show(url, steps, `${nameOf(body.emag.guidance)}, seed ${body.seed}: ${body.prompt}`);
  }

  /** Say why there is no picture. */
  fail(text) {
    this.#become("failed");
    this.#problem(text);
    this.#step = null;
    this.#image.hidden = true;
    this.#find(".frame-text").textContent = "No picture";
    this.#progress(0, 1, "");
  }

  /** What was seen so far stays. */
  cancelled() {
    this.#become("cancelled");
    this.#find(".frame-text").textContent = "Cancelled";
    this.#find(".progress-text").textContent = "Cancelled";
  }

  /**
   * Wait some seconds, or until the person does not want to wait and presses the button of any panel.
   *
   * @throws The signal's reason, if it is aborted.
   */
  countDown(text, seconds, signal) {
    this.waiting("The server is busy");
    this.#problem(text, seconds);
    return new Promise((resolve, reject) => {
      let left = seconds;
      const end = (settle) => {
        clearInterval(timer);
        signal.removeEventListener("abort", aborted);
        document.removeEventListener("retry", pressed);
        this.#find(".problem").hidden = true;
        settle();
      };
      const aborted = () => end(() => reject(signal.reason));
      const pressed = () => end(resolve);
      const timer = setInterval(() => {
        left -= 1;
        this.#problem(text, left);
        if (left <= 0) end(resolve);
      }, 1000);
      signal.addEventListener("abort", aborted);
      document.addEventListener("retry", pressed);
    });
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #become(state) {
    this.#root.dataset.state = state;
    this.#find(".problem").hidden = true;
  }

  #problem(text, seconds = null) {
    this.#find(".problem").hidden = false;
    this.#find(".problem-text").textContent = seconds === null ? text : `${text} Trying again in ${seconds} s.`;
    this.#find(".problem button").hidden = seconds === null;
  }

  #progress(step, steps, text) {
    Object.assign(this.#find("progress"), { max: steps, value: step });
    this.#find(".progress-text").textContent = text;
  }

  #show(source, step, description) {
    const image = this.#image;
    image.src = source;
    image.alt = description;
    const arrived = () => {
      if (image.src !== source) return; // a newer one has taken its place
      image.hidden = false;
      image.classList.toggle("pixelated", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
      this.#step = step;
      this.#onPicture();
    };
    image.decode().then(arrived, () => {}); // decode fails for a picture that was replaced while it loaded
  }

  #copy(write, what) {
    const { body } = this.#result;
    const place = write === curlCommand ? "v1/images/generations" : "v1";
    copyText(write(body, address(place), apiKey.get() !== ""), what);
  }
}
