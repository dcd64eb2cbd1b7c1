// The server's chat page: a conversation with images.

import { Answer } from "./answer.js";
import { make } from "./elements.js";
import { call, events } from "./server.js";

const $ = (id) => document.getElementById(id);
let messages = []; // the conversation, as sent to the server
let pending = []; // images of the next message: {name, uri, views}
let hasSchedule = false; // the server uses PaCoRe by default
let running = null; // the AbortController of the answer in progress

async function request(path, body, signal) {
  try {
    return await call(path, body, { key: $("key").value, signal });
  } catch (error) {
    if (error.status === 401) {
      $("key-field").hidden = false;
      showSettings(true);
      $("key").focus();
    }
    throw error;
  }
}

async function loadModel() {
  try {
    const [model] = (await (await request("v1/models")).json()).data;
    $("model").textContent = document.title = model.id;
    $("status").textContent = "";
    const schedule = model.pacore?.schedule ?? [];
    hasSchedule = schedule.length > 0;
    $("pacore").value = schedule.join(", ");
    fitSettings();
  } catch (error) {
    $("status").textContent = error.message;
  }
}

function fitSettings() {
  $("samples").disabled = Boolean($("pacore").value.trim());
}

function pacore() {
  const schedule = $("pacore").value.trim();
  if (schedule) return { schedule, include: "full" };
  return hasSchedule ? { schedule: [] } : undefined;
}

// Images -------------------------------------------------------------------------------------------------------------

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(file);
  });
}

async function addFiles(files) {
  for (const file of files) {
    let image, item;
    try {
      image = { name: file.name, uri: await read(file), views: null };
      item = showPending(image);
      image.views = await (await request("stepjax/views", { image: image.uri })).json();
      item.querySelector(".caption").replaceWith(viewsOf(image.views, true));
    } catch (error) {
      if (item && error.status === 404) {
        item.querySelector(".caption").textContent = image.name; // an upstream's crops are unknown
        continue;
      }
      pending = pending.filter((each) => each !== image);
      item?.remove();
      showError(`${file.name}: ${error.message}`);
    }
  }
}

function showPending(image) {
  const remove = make("button", { type: "button", "aria-label": `Remove ${image.name}`, text: "Remove" });
  const waiting = make("p", { class: "caption quiet", text: "Cropping\u2026" });
  const note = image.views ? viewsOf(image.views, false) : waiting;
  const item = make("li", {}, make("img", { src: image.uri, alt: image.name }), note, remove);
  remove.onclick = () => {
    pending = pending.filter((each) => each !== image);
    item.remove();
    $("text").focus();
  };
  $("images").append(item);
  pending.push(image);
  return item;
}

// The views of an image, from the server.
function viewsOf({ columns, rows, crops, width, height, tokens, global_view: whole }, isOpen) {
  const count = crops.length ? `${columns} \u00d7 ${rows} crops and the whole image` : "the whole image, no crops";
  const figure = (kind, text, ...content) => make("figure", { class: kind }, make("figcaption", { text }), content);
  const alt = `The whole image, ${width} by ${height} pixels, resized to a square`;
  const grid = crops.map(({ image, row, column }) =>
    make("img", { src: image, alt: `Crop in row ${row + 1}, column ${column + 1}` }));
  return make("details", { class: "views", open: isOpen, "--columns": columns },
    make("summary", { text: `What the model sees: ${count}, ${tokens} tokens` }),
    make("div", { class: "both" },
      figure("whole", `whole image: ${whole.tokens} tokens`, make("img", { src: whole.image, alt })),
      crops.length > 0
        && figure("crops", `crops: ${crops[0].tokens} tokens each`, make("div", { class: "grid" }, grid)),
    ),
  );
}

// The conversation ---------------------------------------------------------------------------------------------------

function showError(message) {
  $("empty").hidden = true;
  $("chat").append(make("p", { class: "error", role: "alert", text: message }));
  scrollDown(true);
}

// Follows the answer unless the user has scrolled up.
function scrollDown(always = false) {
  const chat = $("chat");
  if (always || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 120) chat.scrollTop = chat.scrollHeight;
}

function showQuestion(text, images) {
  $("empty").hidden = true;
  const pictures = images.map(({ uri, views }) =>
    make("div", { class: "picture" }, make("img", { src: uri, alt: "Your image" }), views && viewsOf(views, false)));
  const article = make("article", { class: "own", "aria-label": "You" },
    pictures.length > 0 && make("div", { class: "pictures" }, pictures), make("div", { class: "text", text }));
  $("chat").append(article);
  return article;
}

function numberOf(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

function requestBody() {
  const thinking = $("thinking").value;
  return {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: numberOf("temperature"),
    top_p: numberOf("top-p"),
    max_tokens: numberOf("max-tokens"),
    n: $("samples").disabled ? 1 : (numberOf("samples") ?? 1),
    pacore: pacore(),
    chat_template_kwargs: thinking ? { enable_thinking: thinking === "on" } : undefined,
  };
}

async function ask(text, images) {
  const parts = images.map((image) => ({ type: "image_url", image_url: { url: image.uri } }));
  if (text) parts.push({ type: "text", text });
  const question = showQuestion(text, images);
  const conversation = messages;
  conversation.push({ role: "user", content: parts });

  const body = requestBody();
  const answers = Array.from({ length: body.n }, (_, index) => new Answer(index, body.n));
  const group = make("div", { class: "answers" }, answers.map((answer) => answer.element));
  $("chat").append(group);
  scrollDown(true);
  await draw(body, answers);
  if (conversation !== messages) return; // the user has started a new chat
  if (answers.every((answer) => !answer.content && !answer.reasoning)) {
    // No answer: put the question back so that it can be sent again.
    messages.pop();
    if (!answers[0].rounds) {
      group.remove();
      question.remove();
    }
    if (!$("text").value) $("text").value = text;
    images.forEach(showPending);
    return;
  }
  messages.push({ role: "assistant", content: answers[0].content });
  if (answers.length > 1) offerChoice(answers, messages[messages.length - 1]);
}

async function draw(body, answers) {
  const begun = performance.now();
  const since = (moment) => (performance.now() - moment) / 1000;
  let first = null;
  running = new AbortController();
  setRunning(true);
  const clock = setInterval(() => {
    $("status").textContent = `${since(begun).toFixed(0)} s`;
    answers[0].rounds?.refresh();
  }, 1000);
  try {
    for await (const event of events(await request("v1/chat/completions", body, running.signal))) {
      if (event.pacore) answers[0].take(event.pacore);
      else first ??= performance.now();
      for (const { index, delta, finish_reason: reason } of event.choices) {
        answers[index].add(delta);
        if (reason) answers[index].end(reason);
      }
      if (event.usage) {
        // With PaCoRe, usage counts all calls.
        const [from, prompt] = answers[0].rounds ? [begun, "prompts"] : [first, "prompt"];
        const tokens = event.usage.completion_tokens;
        $("status").textContent =
          `${tokens} tokens, ${(tokens / Math.max(since(from), 0.001)).toFixed(1)} tokens/s, first after ` +
          `${((first - begun) / 1000).toFixed(2)} s; ${prompt}: ${event.usage.prompt_tokens} tokens`;
      }
      scrollDown();
    }
  } catch (error) {
    const isStopped = error.name === "AbortError";
    answers.forEach((answer) => answer.end(isStopped ? "stopped" : ""));
    $("status").textContent = isStopped ? "Stopped." : "";
    if (!isStopped) showError(error.message);
  } finally {
    clearInterval(clock);
    running = null;
    setRunning(false);
  }
}

function offerChoice(answers, message) {
  answers.forEach((answer, index) => {
    const radio = make("input", { type: "radio", name: `choice-${messages.length}`, checked: index === 0 });
    radio.onchange = () => (message.content = answer.content);
    answer.footer.append(make("label", {}, radio, " continue with this one"));
  });
}

// Controls -----------------------------------------------------------------------------------------------------------

function setRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  if (!isRunning && document.activeElement !== $("key")) $("text").focus({ preventScroll: true });
}

function showSettings(isOpen) {
  $("settings").hidden = !isOpen;
  $("settings-toggle").setAttribute("aria-expanded", String(isOpen));
}

$("settings-toggle").onclick = () => showSettings($("settings").hidden);
$("settings").onsubmit = (event) => event.preventDefault();
$("key").onchange = loadModel;
$("pacore").oninput = fitSettings;
$("stop").onclick = () => running?.abort();
$("text").onkeydown = (event) => {
  const isPhone = matchMedia("(pointer: coarse)").matches; // on phones Enter inserts a line break
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isPhone) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("new").onclick = () => {
  running?.abort();
  messages = [];
  $("chat").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("status").textContent = "";
  $("text").focus();
};
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running || (!text && !pending.length)) return;
  if (!$("settings").checkValidity()) {
    showSettings(true); // a hidden field cannot show its error
    $("settings").reportValidity();
    return;
  }
  const images = pending;
  pending = [];
  $("images").replaceChildren();
  $("text").value = "";
  ask(text, images);
};
$("file").onchange = () => {
  addFiles([...$("file").files]);
  $("file").value = "";
};
addEventListener("paste", (event) => {
  addFiles([...event.clipboardData.files]);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addFiles([...event.dataTransfer.files]);
});

loadModel();
$("text").focus();
