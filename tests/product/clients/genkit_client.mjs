// Drives a running server with Genkit and its Google plugin: `node genkit_client.mjs SDK_FOLDER BASE_URL`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { ENDLESS, MODEL, QUESTION, longPrompt, report } from "./checks.mjs";

const [sdkFolder, baseUrl] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${sdkFolder}/package.json`));
const { genkit, z, GenkitError } = require("genkit");
const { googleAI } = require("@genkit-ai/google-genai");
const { logger } = require("genkit/logging");
logger.setLogLevel("error");

const ai = genkit({ plugins: [googleAI({ apiKey: "any", baseUrl })] });
const exact = { temperature: 0, maxOutputTokens: 32 };
const model = googleAI.model(MODEL);
const Forecast = z.object({ city: z.enum(["Paris", "Rome"]), degrees: z.number().int().min(0).max(40) });
const asked = [];
const weather = ai.defineTool(
  { name: "weather", description: "The weather of a city.", inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }), outputSchema: z.string() },
  async ({ city }) => {
    asked.push(city);
    return `21 degrees in ${city}`;
  },
);

await report(JSON.parse(readFileSync(`${sdkFolder}/node_modules/genkit/package.json`, "utf8")).version, {
  async text() {
    const answer = await ai.generate({ model, system: "You are helpful.", prompt: QUESTION, config: exact });
    assert.match(answer.text, /Paris/);
    assert.equal(answer.finishReason, "stop");
    assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
  },
  async streamEqualsWhole() {
    const whole = await ai.generate({ model, prompt: QUESTION, config: exact });
    const { stream, response } = ai.generateStream({ model, prompt: QUESTION, config: exact });
    const pieces = [];
    for await (const chunk of stream) pieces.push(chunk.text);
    assert.ok(pieces.length > 1);
    assert.equal(pieces.join(""), whole.text);
    assert.equal((await response).text, whole.text);
  },
  async toolsMustBeCalled() {
    const request = { model, prompt: "What is the weather in Paris?", tools: [weather], toolChoice: "required", returnToolRequests: true };
    const answer = await ai.generate({ ...request, config: { ...exact, maxOutputTokens: 64 } });
    assert.ok(answer.toolRequests.length >= 1);
    const [{ toolRequest }] = answer.toolRequests;
    assert.equal(toolRequest.name, "weather");
    assert.ok(["Paris", "Rome"].includes(toolRequest.input.city));
    const results = answer.toolRequests.map(({ toolRequest: call }) => ({ toolResponse: { name: call.name, ref: call.ref, output: "21 degrees" } }));
    const told = await ai.generate({ model, messages: [...answer.messages, { role: "tool", content: results }], tools: [weather], toolChoice: "none", config: exact });
    assert.equal(told.toolRequests.length, 0);
    const bare = await ai.generate({ model, prompt: request.prompt, config: { ...exact, maxOutputTokens: 1 } });
    assert.ok(told.usage.inputTokens > bare.usage.inputTokens, "the result is in the context");
  },
  async structuredOutput() {
    const answer = await ai.generate({ model, prompt: "21 degrees in Paris.", output: { schema: Forecast }, config: { ...exact, maxOutputTokens: 64 } });
    assert.deepEqual(Forecast.parse(answer.output), answer.output);
  },
  async errors() {
    // It has no status of its own for 404.
    for (const [status, code, wrong] of [["UNKNOWN", 404, { model: googleAI.model("no-such-model") }], ["INVALID_ARGUMENT", 400, { config: { stopSequences: [""] } }]])
      await assert.rejects(ai.generate({ model, prompt: "hi", ...wrong }), (error) => {
        assert.ok(error instanceof GenkitError, error.stack);
        assert.equal(error.status, status, error.stack);
        assert.match(error.message, new RegExp(`\\[${code} `));
        return true;
      });
  },
  async silence() {
    const { stream, response } = ai.generateStream({ model: googleAI.model(ENDLESS), prompt: longPrompt(), config: { maxOutputTokens: 8 } });
    let text = "";
    for await (const chunk of stream) text += chunk.text;
    assert.equal(text.length, 8);
    assert.equal((await response).text, text);
  },
  async errorInAStream() {
    const hurried = genkit({ plugins: [googleAI({ apiKey: "any", baseUrl, customHeaders: { "x-server-timeout": "1" } })] });
    const { stream, response } = hurried.generateStream({ model: googleAI.model(ENDLESS), prompt: "hi", config: { maxOutputTokens: 30_000 } });
    response.catch(() => {});
    // It reads the event of the error as an answer without candidates; the last bytes tell it what failed.
    await assert.rejects(async () => {
      for await (const _ of stream);
      await response;
    }, { status: "DEADLINE_EXCEEDED" });
  },
});
process.exit(0);
