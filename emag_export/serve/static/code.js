// A request as text that can be run elsewhere, and draws the same picture there.

const JSON_WORDS = { true: "true", false: "false", null: "null" };
const PYTHON_WORDS = { true: "True", false: "False", null: "None" };
/** Arguments of the OpenAI client; everything else goes into its `extra_body`. */
const CLIENT_ARGUMENTS = ["model", "prompt", "size"];

/** JSON in which a BigInt is a number, with all its digits. */
export function toJson(value) {
  return literal(value, JSON_WORDS, null, "");
}

/** Name of a picture's file, free of what a shell or a file system would trip over. */
export function fileName(body) {
  const words = [body.model, "seed", body.seed, body.emag.guidance].map(String);
  return words.join("-").replace(/[^A-Za-z0-9.+-]+/g, "-").replace(/^[.-]+/, "") + ".png";
}

/**
 * A shell command that leaves the picture in a file.
 *
 * @param {object} body Of the request, without `stream`.
 * @param {string} url Of the route.
 * @param {boolean} needsKey The key itself is never written out: it comes from EMAG_API_KEY.
 */
export function curlCommand(body, url, needsKey) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const lines = [
    `curl -sS ${quoted(url)}`,
    "-H 'Content-Type: application/json'",
    ...(needsKey ? ['-H "Authorization: Bearer $EMAG_API_KEY"'] : []),
    `-d ${quoted(literal(body, JSON_WORDS, "  ", ""))}`,
    `| jq -r '.data[0].b64_json' | base64 --decode > ${fileName(body)}`,
  ];
  return lines.join(" \\\n  ") + "\n";
}

/** The same with the official OpenAI client; arguments as for {@link curlCommand}. */
export function pythonProgram(body, baseUrl, needsKey) {
  const python = (value, edge = "") => literal(value, PYTHON_WORDS, "    ", edge);
  const entries = Object.entries(body);
  const own = entries.filter(([name]) => CLIENT_ARGUMENTS.includes(name));
  const extra = entries.filter(([name]) => !CLIENT_ARGUMENTS.includes(name));
  const key = needsKey ? 'os.environ["EMAG_API_KEY"]' : '"none"';
  return [
    "import base64",
    ...(needsKey ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(baseUrl)}, api_key=${key})`,
    "answer = client.images.generate(",
    ...own.map(([name, value]) => `    ${name}=${python(value, "    ")},`),
    `    extra_body=${python(Object.fromEntries(extra), "    ")},`,
    ")",
    `Path(${python(fileName(body))}).write_bytes(base64.b64decode(answer.data[0].b64_json))`,
    "",
  ].join("\n");
}

/**
 * A value as JSON, or as Python: their texts, numbers, lists and objects are written alike.
 *
 * @param {unknown} value
 * @param {Record<string, string>} words What the language calls true, false and nothing.
 * @param {string|null} indent Of one level of objects; null writes one line.
 * @param {string} edge What lines of this level begin with.
 */
function literal(value, words, indent, edge) {
  if (value === null || typeof value === "boolean") return words[String(value)];
  if (typeof value === "bigint") return String(value);
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = indent === null ? edge : edge + indent;
  if (Array.isArray(value)) return `[${value.map((one) => literal(one, words, null, "")).join(", ")}]`;
  const entries = Object.entries(value).map(
    ([name, one]) => `${JSON.stringify(name)}: ${literal(one, words, indent, inner)}`,
  );
  if (indent === null) return `{${entries.join(", ")}}`;
  const comma = words === PYTHON_WORDS ? "," : "";
  return `{\n${entries.map((entry) => inner + entry).join(",\n")}${comma}\n${edge}}`;
}
