// Every refusal as the class a program would catch, and what is sent again.

import { HELLO, MODEL, asked, caught, given, openai, report, shown } from "./client.mjs";

const ask = (client, more = {}) =>
  caught(client.chat.completions.create({ model: MODEL, messages: HELLO, ...more }));
const once = openai({ maxRetries: 0 });

async function broken() {
  const messages = asked("fault=error_event; chunks=20");
  const stream = await openai().chat.completions.create({ model: MODEL, messages, stream: true });
  let count = 0;
  try {
    for await (const _chunk of stream) count += 1;
  } catch (error) {
    return { count, ...shown(error) };
  }
  throw new Error("it ended well");
}

report({
  unknown_key: await ask(openai({ apiKey: "inf_" + "A".repeat(43) })),
  unknown_model: await ask(once, { model: "gpt-99" }),
  malformed: await ask(once, { max_tokens: -1 }),
  model_not_allowed: await ask(openai({ apiKey: given.narrow })),
  empty_wallet: await ask(openai({ apiKey: given.poor })),
  provider_refuses: await ask(openai(), { messages: asked("status=422") }),
  provider_fails: await ask(openai(), { messages: asked("status=500") }),
  broken: await broken(),
});
