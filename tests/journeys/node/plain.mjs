// A plain answer with its response, several at once, and the list of models.

import { HELLO, MODEL, openai, report } from "./client.mjs";

const client = openai();
const { data, response, request_id } = await client.chat.completions
  .create({ model: MODEL, messages: HELLO })
  .withResponse();
const many = await Promise.all(
  Array.from({ length: 10 }, () => client.chat.completions.create({ model: MODEL, messages: HELLO })),
);
const models = [];
for await (const model of client.models.list()) models.push(model.id);

report({
  content: data.choices[0].message.content,
  usage: data.usage,
  request_ids: [request_id, data._request_id, response.headers.get("x-request-id")],
  credits: response.headers.get("x-credits-used"),
  model: response.headers.get("x-model-used"),
  limit: response.headers.get("x-ratelimit-limit-requests"),
  many: many.map((one) => one.usage.completion_tokens),
  models,
});
