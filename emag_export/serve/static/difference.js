// What differs between two pictures, amplified so that it can be seen.

/** The panel with the difference picture. */
export class Difference {
  #canvas = document.getElementById("difference-canvas");
  #text = document.getElementById("difference-text");
  #facts = document.getElementById("difference-facts");
  #factor = document.getElementById("factor");
  #differences = null;

  constructor() {
    this.#factor.addEventListener("input", () => this.#draw());
    this.#showFactor();
  }

  /** Say what is compared with what. */
  title(left, right) {
    document.getElementById("difference-rule").textContent = `|${left} − ${right}|`;
  }

  /** Show no picture, and why. */
  clear(text) {
    this.#differences = null;
    this.#canvas.hidden = true;
    this.#text.textContent = text;
    this.#facts.textContent = "";
  }

  /**
   * Compare two pictures that have been loaded.
   *
   * @param {HTMLImageElement} left
   * @param {HTMLImageElement} right
   */
  compare(left, right) {
    const { naturalWidth: width, naturalHeight: height } = left;
    if (width !== right.naturalWidth || height !== right.naturalHeight) {
      this.clear("The pictures differ in size");
      return;
    }
    const [a, b] = [pixelsOf(left), pixelsOf(right)];
    this.#differences = { width, height, levels: a.map((level, index) => Math.abs(level - b[index])) };
    this.#facts.textContent = inWords(this.#differences.levels);
    this.#canvas.setAttribute("aria-label", `Difference of the two pictures. ${this.#facts.textContent}`);
    this.#canvas.classList.toggle("pixelated", left.classList.contains("pixelated"));
    this.#draw();
  }

  #showFactor() {
    document.getElementById("factor-shown").textContent = `${this.#factor.value} ×`;
    this.#factor.setAttribute("aria-valuetext", `${this.#factor.value} times`);
  }

  #draw() {
    this.#showFactor();
    if (!this.#differences) return;
    const { width, height, levels } = this.#differences;
    Object.assign(this.#canvas, { width, height, hidden: false });
    const picture = new ImageData(width, height);
    const factor = Number(this.#factor.value);
    for (let index = 0; index < levels.length; index++) {
      // Clamped at 255 by the array; every fourth number is the opacity, which never differs.
      picture.data[index] = index % 4 === 3 ? 255 : factor * levels[index];
    }
    this.#canvas.getContext("2d").putImageData(picture, 0, 0);
  }
}

function pixelsOf(image) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

function inWords(levels) {
  let [sum, largest] = [0, 0];
  for (const level of levels) {
    sum += level;
    largest = Math.max(largest, level);
  }
  if (largest === 0) return "Every pixel is the same";
  const mean = sum / (levels.length * 0.75); // without the opacities
  return `Of 255 levels: mean ${mean.toFixed(1)}, largest ${largest}`;
}
