// From what the form says to the body of a request.

const LARGEST_SEED = 2n ** 63n - 1n;
const EMAG_NUMBERS = ["scale", "beta", "start", "delta", "stop", "strength", "random_blocks", "blur_sigma"];
const GUIDANCE_NUMBERS = ["embedded_guidance", "cfg_rescale", "cfg_zero_init", "guided_channels"];
const QUEUE_NUMBERS = ["priority", "deadline"];

/** Whether a guidance steers away from a hard negative, so that EMAG's settings matter to it. */
export function usesEmag(guidance) {
  return guidance.split("+")[0].startsWith("emag");
}

/** A seed short enough to be read aloud. */
export function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

/** Whether a text is a seed that the server takes. */
export function isSeed(text) {
  return /^\d{1,19}$/.test(text) && BigInt(text) <= LARGEST_SEED;
}

/**
 * The body that draws one picture; what is left empty is left to the server.
 *
 * @param {Record<string, string|string[]>} values Of the form, by field of the API; `width` and `height` for its `size`.
 * @param {string} guidance
 * @returns {object} Its seed is a BigInt: seeds go up to 2^63 - 1, beyond what a number holds exactly.
 */
export function requestBody(values, guidance) {
  const emag = (names) => Object.fromEntries(names.map((name) => [name, number(values[`emag.${name}`])]));
  const blocks = values["emag.blocks"].map(Number);
  return given({
    model: values.model,
    prompt: values.prompt,
    negative_prompt: values.negative_prompt || undefined,
    size: `${values.width}x${values.height}`,
    seed: BigInt(values.seed),
    num_inference_steps: number(values.num_inference_steps),
    guidance_scale: number(values.guidance_scale),
    emag: given({
      guidance,
      guidance_interval: numbers(values["emag.guidance_interval"]),
      cfg_zero_star: values["emag.cfg_zero_star"] === "true" || undefined,
      tcfg: values["emag.tcfg"] === "true" || undefined,
      ...emag(GUIDANCE_NUMBERS),
      ...(usesEmag(guidance)
        ? {
            ...emag(EMAG_NUMBERS),
            unit: values["emag.unit"] || undefined,
            blocks: blocks.length ? blocks : undefined,
          }
        : {}),
      ...emag(QUEUE_NUMBERS),
    }),
  });
}

/** The same request as a stream, with previews where the model has them. */
export function streamed(body, values, hasPreviews) {
  const every = hasPreviews ? number(values["emag.preview_every"]) : undefined;
  return { ...body, stream: true, emag: given({ ...body.emag, preview_every: every }) };
}

function number(text) {
  return text === "" || text === undefined ? undefined : Number(text);
}

function numbers(text) {
  const words = (text ?? "").split(/[\s,]+/).filter(Boolean);
  return words.length ? words.map(Number) : undefined;
}

function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}
