// The official client with a tap on its wire, and the report of what a script found.
// OPENAI_BASE_URL and OPENAI_API_KEY say where to and as whom, as for any program.

import OpenAI from "openai";

export const MODEL = "sandbox-small";
export const HELLO = [{ role: "user", content: "Say hello." }];
export const given = JSON.parse(process.argv[2] ?? "{}");
const sent = [];

// Messages that make the stand-in provider do what `script` says.
export function asked(script) {
  return [{ role: "user", content: `Hello. [[standin ${script}]]` }];
}

export function openai(options = {}) {
  return new OpenAI({ fetch: tapped, timeout: 30_000, ...options });
}

async function tapped(url, init) {
  const { status, statusText, headers, body } = await fetch(url, init);
  const retry = Number(new Headers(init.headers).get("x-stainless-retry-count") ?? 0);
  const one = { status, retry, header: headers.get("x-credits-used"), text: "" };
  sent.push(one);
  const decoder = new TextDecoder();
  const copy = new TransformStream({
    transform(bytes, next) {
      one.text += decoder.decode(bytes, { stream: true });
      next.enqueue(bytes);
    },
  });
  return new Response(body.pipeThrough(copy), { status, statusText, headers });
}

// Credits as the text that was on the wire: a number of JavaScript is not exact.
function told(one) {
  return one.header ?? one.text.match(/"credits_used":([0-9.]+)/)?.[1] ?? "0";
}

// What an error is to the program that catches it.
export function shown(error) {
  const { status, code, type, requestID } = error;
  return { name: error.constructor.name, status, code, type, requestID };
}

export async function caught(promise) {
  try {
    await promise;
  } catch (error) {
    return shown(error);
  }
  throw new Error("it was served");
}

export function report(found) {
  const answers = sent.map((one) => ({ status: one.status, retry: one.retry, credits: told(one) }));
  console.log(JSON.stringify({ found, sent: answers }));
}
