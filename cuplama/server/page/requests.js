// What is asked of the server for a conversation, and what its events mean. Chats and plain texts differ here alone.

/**
 * The settings that a person may change. One that is left empty is not sent, so the model's own value holds.
 */
export const SETTINGS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    about: "0 always takes the likeliest token; more is more varied.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0,
    max: 1,
    step: 0.01,
    about: "Draws from the likeliest tokens that together reach this probability.",
  },
  { name: "top_k", label: "Top k", min: 0, step: 1, about: "Draws from this many of the likeliest tokens; 0 is off." },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 1,
    step: 0.01,
    about: "Leaves out tokens less likely than this part of the likeliest.",
  },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, about: "The longest answer, in tokens." },
  { name: "seed", label: "Seed", min: 0, step: 1, about: "The same seed gives the same answer." },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.5,
    max: 2,
    step: 0.05,
    about: "Above 1, tokens that have appeared become less likely.",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    min: -2,
    max: 2,
    step: 0.1,
    about: "Lowers tokens that the answer has already.",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    min: -2,
    max: 2,
    step: 0.1,
    about: "Lowers them once for each time.",
  },
];

// The completions API ends after 16 tokens where nothing is said; a person wants a paragraph.
const TEXT_TOKENS = 256;

const KINDS = {
  chat: {
    path: "v1/chat/completions",
    prompt({ system, messages }) {
      const told = system ? [{ role: "system", content: system }] : [];
      const said = messages.map(({ role, content }) => ({ role, content }));
      const goesOn = said.at(-1)?.role === "assistant"; // with an answer that was cut off
      return {
        messages: [...told, ...said],
        ...(goesOn && { continue_final_message: true, add_generation_prompt: false }),
      };
    },
    read: ({ delta = {} }) => ({
      text: delta.content ?? "",
      reasoning: delta.reasoning ?? delta.reasoning_content ?? "",
    }),
  },
  text: {
    path: "v1/completions",
    prompt: ({ messages }) => ({ prompt: messages.map((m) => m.content).join(""), max_tokens: TEXT_TOKENS }),
    read: ({ text = "" }) => ({ text, reasoning: "" }),
  },
};

/** Path and body of the request that answers the conversation's messages so far. */
export function requestOf(conversation, settings, model) {
  const { path, prompt } = KINDS[conversation.kind];
  const messages = conversation.messages.filter((m) => m.content);
  const options = { model, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  return { path, body: { ...options, ...prompt({ ...conversation, messages }), ...settings } };
}

/** What an event adds: text, reasoning, at the end why it ended, and what was counted until now. */
export function readEvent(kind, { choices, usage }) {
  const choice = choices?.[0];
  const added = choice ? KINDS[kind].read(choice) : { text: "", reasoning: "" };
  return { ...added, finish: choice?.finish_reason ?? null, usage: usage ?? null };
}

/** Figures of an answer so far. Times in milliseconds: of the request, its first token, and its last. */
export function statsOf(usage, begun, first, last) {
  const { prompt_tokens: prompt, completion_tokens: tokens, prompt_tokens_details: details } = usage;
  // The first token waits for the prompt; what follows shows the speed. Few tokens may all come in one piece.
  const speed =
    tokens > 1 && last - first > 50
      ? ((tokens - 1) * 1000) / (last - first)
      : (tokens * 1000) / Math.max(last - begun, 1);
  return { prompt, tokens, cached: details?.cached_tokens ?? 0, speed, wait: first - begun };
}
