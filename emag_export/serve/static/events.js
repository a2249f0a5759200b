// Server-sent events, read from a fetch: EventSource can neither POST nor send a key.

/**
 * Events of a stream, as the standard splits them; where its chunks are cut makes no difference.
 *
 * @param {ReadableStream<Uint8Array>} stream Body of an answer. Leaving the loop early closes it.
 * @yields {{name: string, data: string}} Comments, and an event that the end of the stream cuts off, are dropped.
 */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { name: "message", data: [] };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      // A return at the end of a chunk may be the first half of a line end, so it waits for the next chunk.
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line !== "") {
          take(event, line);
          continue;
        }
        if (event.data.length) yield { name: event.name, data: event.data.join("\n") };
        event = { name: "message", data: [] };
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // the connection may be gone already
  }
}

function take(event, line) {
  const colon = line.indexOf(":");
  const field = colon < 0 ? line : line.slice(0, colon); // a comment's field is empty
  const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
  if (field === "event") event.name = value;
  if (field === "data") event.data.push(value);
}
