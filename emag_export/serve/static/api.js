// The server's API: models, a streamed picture, how far a request is, and giving it up.

import { readEvents } from "./events.js";
import { toJson } from "./code.js";

const KEY = "emag-api-key";

/** An answer that is no success, or none at all. */
export class ApiError extends Error {
  /**
   * @param {string} message For people.
   * @param {{status?: number, param?: string|null, code?: string|null, retryAfter?: number|null}} facts
   *   `retryAfter` is in seconds; null where trying again later does not help.
   */
  constructor(message, { status = 0, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

/** The key that requests carry; this tab alone knows it, and only until it is closed. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => sessionStorage.setItem(KEY, text),
};

/** Where a path of the API is, also behind a proxy that adds a folder. */
export function address(path) {
  return new URL(path, document.baseURI).href;
}

/** An id that the server takes for a request. Known before the answer comes, so that waiting can be given up. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return "page_" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What is served, the server's default first. */
export async function listModels() {
  return (await (await call("v1/models")).json()).data;
}

/** How far a request is. */
export async function requestState(id, signal) {
  return (await call(`v1/requests/${encodeURIComponent(id)}`, { signal })).json();
}

/** Give a request up. It may have ended already, or never begun; both are fine. */
export async function cancelRequest(id) {
  await call(`v1/requests/${encodeURIComponent(id)}`, { method: "DELETE", keepalive: true }).catch(() => {});
}

/**
 * Draw one picture.
 *
 * @param {object} body Of the request, with `stream`.
 * @param {{id: string, signal: AbortSignal, onStart: (id: string) => void, onPreview: (event: object) => void}} options
 * @returns {Promise<string>} The finished PNG in base64.
 * @throws {ApiError} If there is none.
 */
export async function streamPicture(body, { id, signal, onStart, onPreview }) {
  const answer = await call("v1/images/generations", { method: "POST", body, id, signal });
  onStart(answer.headers.get("x-request-id") ?? id);
  try {
    for await (const { name, data } of readEvents(answer.body)) {
      const event = JSON.parse(data);
      if (name === "image_generation.partial_image") onPreview(event);
      if (name === "image_generation.completed") return event.b64_json;
      if (event.error) throw new ApiError(event.error.message, event.error);
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("The connection broke before the picture was finished. Try again.");
  }
  throw new ApiError("The server ended the answer before the picture was finished. Try again.");
}

/** Bytes that base64 stands for. */
export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

async function call(path, { method = "GET", body, id, signal, keepalive = false } = {}) {
  const headers = {};
  if (apiKey.get()) headers["Authorization"] = `Bearer ${apiKey.get()}`;
  if (id) headers["X-Request-Id"] = id;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(address(path), { method, headers, signal, keepalive, body: body && toJson(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. See whether it runs, then try again.");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const known = { status: answer.status, retryAfter: retrySeconds(answer.headers.get("Retry-After")) };
  try {
    const { message, param, code } = (await answer.json()).error;
    return new ApiError(message, { ...known, param, code });
  } catch {
    // Something between this page and the server answered, in a form of its own.
    return new ApiError(`The server answered ${answer.status} and did not say why.`, known);
  }
}

/** Seconds of a Retry-After header, which a proxy may write as a date. */
function retrySeconds(text) {
  if (!text) return null;
  const seconds = /^\d+$/.test(text) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}
