// A provider that is limited at first: the client waits and asks again.

import { HELLO, openai, report } from "./client.mjs";

const { data, response } = await openai()
  .chat.completions.create({ model: "watched", messages: HELLO })
  .withResponse();
report({ tokens: data.usage.completion_tokens, credits: response.headers.get("x-credits-used") });
