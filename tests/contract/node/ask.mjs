// What the official client sees: one case for each name on the command line, one line of JSON for each on stdout.
import OpenAI from "openai";

const [baseURL, apiKey, ...cases] = process.argv.slice(2);
const open = (key) => new OpenAI({ baseURL, apiKey: key, maxRetries: 0, timeout: 30_000 });
const client = open(apiKey);
const say = (words) => [{ role: "user", content: `go on [[${words}]]` }];

async function failing(promise) {
  try {
    await promise;
  } catch (error) {
    const { status, code, type, param, message } = error;
    return { class: error.constructor.name, status, code, type, param, message };
  }
  return { class: null };
}

const CASES = {
  async whole() {
    const answer = await client.chat.completions.create({ model: "tiny", messages: say("tokens=3"), max_tokens: 8 });
    return { id: answer.id, text: answer.choices[0].message.content, usage: answer.usage };
  },

  async stream() {
    const stream = await client.chat.completions.create({
      model: "tiny", messages: say("tokens=6 delay_ms=5"), stream: true, stream_options: { include_usage: true },
    });
    const texts = [];
    let id, usage, finish;
    for await (const chunk of stream) {
      id = chunk.id;
      usage = chunk.usage ?? usage;
      finish = chunk.choices[0]?.finish_reason ?? finish;
      if (chunk.choices[0]?.delta.content) texts.push(chunk.choices[0].delta.content);
    }
    return { id, texts, usage, finish };
  },

  async abort() {
    const stream = await client.chat.completions.create({
      model: "tiny", messages: say("tokens=2000 delay_ms=10"), stream: true,
    });
    let seen = 0, id;
    for await (const chunk of stream) {
      id = chunk.id;
      if (chunk.choices[0]?.delta.content && ++seen === 5) stream.controller.abort();
    }
    return { id, seen };
  },

  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    return { names };
  },

  async errors() {
    const ask = (using, fields) => failing(using.chat.completions.create({ model: "tiny", messages: say("tokens=1"), ...fields }));
    return {
      wrong_key: await ask(open("sk-zen-nobody"), {}),
      unknown_model: await ask(client, { model: "tinny" }),
      unknown_field: await ask(client, { temprature: 1 }),
      too_long: await ask(client, { max_tokens: 1_000_000 }),
      no_credit: await ask(open("sk-zen-poor"), {}),
      engine_fails: await ask(client, { messages: say("status=500") }),
    };
  },

  async cut() {
    const stream = await client.chat.completions.create({
      model: "tiny", messages: say("tokens=9 fail_after=4 fail=cut"), stream: true,
    });
    const texts = [];
    const error = await failing((async () => {
      for await (const chunk of stream) if (chunk.choices[0]?.delta.content) texts.push(chunk.choices[0].delta.content);
    })());
    return { texts, error };
  },
};

for (const name of cases) console.log(JSON.stringify(await CASES[name]()));
