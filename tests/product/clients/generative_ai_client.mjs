// Drives a running server with the JavaScript SDK that came before @google/genai, which LangChain.js, n8n and LibreChat
// use: `node generative_ai_client.mjs SDK_FOLDER BASE_URL`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { ENDLESS, MODEL, QUESTION, longPrompt, report } from "./checks.mjs";

const [sdkFolder, baseUrl] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${sdkFolder}/package.json`));
const { FunctionCallingMode, GoogleGenerativeAI, GoogleGenerativeAIFetchError, SchemaType } = require("@google/generative-ai");
const { version } = JSON.parse(readFileSync(`${sdkFolder}/node_modules/@google/generative-ai/package.json`, "utf8"));

const exact = { temperature: 0, maxOutputTokens: 32 };
const named = (model = MODEL, settings = {}, headers = {}) => {
  const generationConfig = { ...exact, ...settings.generationConfig };
  const options = { baseUrl, customHeaders: headers };
  return new GoogleGenerativeAI("any").getGenerativeModel({ model, ...settings, generationConfig }, options);
};
const textOf = async ({ stream, response }) => {
  const pieces = [];
  response.catch(() => {});
  for await (const chunk of stream) pieces.push(chunk.text());
  assert.equal(pieces.join(""), (await response).text());
  return pieces;
};
const city = { type: SchemaType.STRING, format: "enum", enum: ["Paris", "Rome"] };
const place = { type: SchemaType.OBJECT, properties: { city }, required: ["city"] };

await report(version, {
  async text() {
    const { response } = await named().generateContent(QUESTION);
    assert.match(response.text(), /Paris/);
    assert.equal(response.candidates[0].finishReason, "STOP");
  },
  async streamEqualsWhole() {
    const { response } = await named().generateContent(QUESTION);
    const pieces = await textOf(await named().generateContentStream(QUESTION));
    assert.ok(pieces.length > 1);
    assert.equal(pieces.join(""), response.text());
  },
  async chat() {
    const chat = named(MODEL, { systemInstruction: "You are helpful." }).startChat();
    // A streamed turn that ends in an empty text, as here and in the cloud, it leaves out of its history
    // (google-gemini/deprecated-generative-ai-js#309).
    await chat.sendMessage("My name is Ada.");
    await chat.sendMessage("What is my name?");
    assert.deepEqual((await chat.getHistory()).map(({ role }) => role), ["user", "model", "user", "model"]);
  },
  async tools() {
    const tools = [{ functionDeclarations: [{ name: "weather", description: "The weather of a city.", parameters: place }] }];
    const calling = { tools, toolConfig: { functionCallingConfig: { mode: FunctionCallingMode.ANY } } };
    const chat = named(MODEL, { ...calling, generationConfig: { maxOutputTokens: 64 } }).startChat();
    const { response } = await chat.sendMessage("What is the weather in Paris?");
    const calls = response.functionCalls();
    assert.ok(calls.length >= 1 && calls.every(({ name, args }) => name === "weather" && city.enum.includes(args.city)));
    const results = calls.map(({ name }) => ({ functionResponse: { name, response: { degrees: 21 } } }));
    assert.ok((await chat.sendMessage(results)).response.candidates);
    assert.deepEqual((await chat.getHistory()).map(({ role }) => role), ["user", "model", "function", "model"]);
  },
  async structuredOutput() {
    const generationConfig = { responseMimeType: "application/json", responseSchema: place, maxOutputTokens: 64 };
    const { response } = await named(MODEL, { generationConfig }).generateContent("Say Paris.");
    assert.ok(city.enum.includes(JSON.parse(response.text()).city));
  },
  async countTokens() {
    const { response } = await named().generateContent(QUESTION);
    assert.equal((await named().countTokens(QUESTION)).totalTokens, response.usageMetadata.promptTokenCount);
  },
  async errors() {
    for (const [status, wrong] of [[404, named("no-such-model")], [400, named(MODEL, { generationConfig: { temperature: 9 } })]])
      for (const method of ["generateContent", "generateContentStream"])
        await assert.rejects(wrong[method]("hi"), (error) => {
          assert.ok(error instanceof GoogleGenerativeAIFetchError);
          assert.equal(error.status, status);
          return true;
        });
  },
  async silence() {
    const settings = { generationConfig: { maxOutputTokens: 8 } };
    const pieces = await textOf(await named(ENDLESS, settings).generateContentStream(longPrompt()));
    assert.equal(pieces.join("").length, 8);
  },
  async errorInAStream() {
    const settings = { generationConfig: { maxOutputTokens: 30_000 } };
    const { stream, response } = await named(ENDLESS, settings, { "X-Server-Timeout": "1" }).generateContentStream("hi");
    response.catch(() => {});
    // It reads the event of the error as an answer without candidates, and fails at the last bytes.
    await assert.rejects(async () => {
      for await (const chunk of stream) chunk.text();
    }, /Failed to parse stream/);
  },
});
