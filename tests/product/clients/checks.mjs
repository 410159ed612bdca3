// What the checks of JavaScript clients have in common: models, prompts, and the report that is read. The server has
// the models of models.yaml, and ENDLESS, which writes for as long as it may; it sends a keep-alive after every
// twentieth of a second of silence.
import { randomUUID } from "node:crypto";

export const MODEL = "smollm2-135m-instruct";
export const ENDLESS = "endless";
export const QUESTION = "What is the capital of France?";

// Its prefill takes about a second, because it begins as no prompt before it did: a silence.
export const longPrompt = () => `${randomUUID()} ${"river stone lantern market copper window garden thunder ".repeat(230)}`;

// Runs the checks in their order, and prints what became of them as one line of JSON.
export async function report(version, checks) {
  const outcome = {};
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check();
      outcome[name] = "ok";
    } catch (error) {
      outcome[name] = `${error.stack ?? error}\n${error.responseBody ?? ""}`;
    }
  }
  console.log(JSON.stringify({ version, outcome }));
}
