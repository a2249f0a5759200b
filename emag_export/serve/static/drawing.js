// One picture from request to file: tries again when the server is busy, and gives up when told to.

import { ApiError, bytesOf, cancelRequest, newRequestId, requestState, streamPicture } from "./api.js";

const AUTOMATIC_TRIES = 5;
/** Milliseconds between questions how far a request is, while its stream is silent. */
const ASK_EVERY = 500;

/**
 * Draw one side of a run.
 *
 * @param {import("./panel.js").Panel} panel Shows how it goes.
 * @param {{body: object, stream: object, onBusy: (why: string|null) => void}} job The request, how it is sent, and
 *   what is told why it has to wait; null when it has not to any more.
 * @param {AbortSignal} signal
 * @returns {Promise<object>} Body, PNG as a Blob and its address, size in words, seconds.
 * @throws {ApiError} If the server does not draw it.
 */
export async function draw(panel, job, signal) {
  for (let tries = 1; ; tries++) {
    try {
      return await attempt(panel, job, signal);
    } catch (error) {
      if (signal.aborted || !error.retryAfter || tries > AUTOMATIC_TRIES) throw error;
      job.onBusy(sentence(error.message));
      await panel.countDown(sentence(error.message), error.retryAfter, signal);
      job.onBusy(null);
    }
  }
}

/** A message of the server as a sentence of the page. */
export function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

async function attempt(panel, { body, stream }, signal) {
  const began = performance.now();
  const watch = new AbortController();
  const heard = { at: 0 };
  let id = newRequestId();
  const giveUp = () => cancelRequest(id);
  signal.addEventListener("abort", giveUp, { once: true });
  panel.waiting("Waiting for the server");
  try {
    const png = await streamPicture(stream, {
      id,
      signal,
      onStart: (given) => {
        id = given;
        ask(panel, id, heard, watch.signal);
      },
      onPreview: (event) => {
        heard.at = performance.now();
        panel.preview(event);
      },
    });
    const blob = new Blob([bytesOf(png)], { type: "image/png" });
    const size = body.size.replace("x", " × ");
    return { body, blob, url: URL.createObjectURL(blob), size, seconds: (performance.now() - began) / 1000 };
  } finally {
    watch.abort();
    signal.removeEventListener("abort", giveUp);
  }
}

/** Ask how far a request is while its stream says nothing: it queues, or has no previews or few. */
async function ask(panel, id, heard, signal) {
  while (!signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, ASK_EVERY));
    if (signal.aborted || performance.now() - heard.at < ASK_EVERY) continue;
    try {
      const { status, step, steps } = await requestState(id, signal);
      if (signal.aborted) return;
      if (status === "queued") panel.waiting("In the queue");
      if (status === "running" && step > 0) panel.advance(step, steps);
    } catch (error) {
      // The stream tells what matters; what is asked here only fills its silence.
      if (!(error instanceof ApiError) && !signal.aborted) throw error;
    }
  }
}
