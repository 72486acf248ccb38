// Streams: as chunks, through the helper, with usage asked for, and one that is left.

import { HELLO, MODEL, asked, openai, report } from "./client.mjs";

const client = openai();

async function chunks(options) {
  const stream = await client.chat.completions.create({ model: MODEL, stream: true, ...options });
  const found = [];
  for await (const chunk of stream) found.push(chunk);
  return found;
}

async function left() {
  const messages = asked("fault=hang_mid_stream; fault_after=3");
  const stream = await client.chat.completions.create({ model: MODEL, messages, stream: true });
  let count = 0;
  for await (const _chunk of stream) if (++count === 4) break;
  return count;
}

const simple = await chunks({ messages: HELLO });
const wanted = await chunks({ messages: HELLO, stream_options: { include_usage: true } });
const awkward = await chunks({ messages: asked("split_utf8=1; split_events=1; crlf=1") });
const helper = client.chat.completions.stream({ model: MODEL, messages: HELLO });
const final = await helper.finalChatCompletion();

const text = (found) => found.flatMap((one) => one.choices.map((c) => c.delta.content ?? "")).join("");
report({
  text: text(simple),
  last: simple.at(-1),
  usages: [simple, wanted].map((found) => found.filter((one) => one.usage).length),
  nulls: wanted.filter((one) => one.usage === null).length,
  awkward: text(awkward),
  final: { content: final.choices[0].message.content, finish: final.choices[0].finish_reason },
  total: await helper.totalUsage(),
  left: await left(),
});
