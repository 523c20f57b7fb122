// Runs once in the part of the page that listens live: `element` is that part, and `server` calls Python. Sound is recorded at the
// model's rate, and sent block by block: the next one when the former one is answered, with all that was recorded meanwhile.
const part = element.querySelector(".sslam-live"), find = (name) => part.querySelector(name);
const button = find("button"), { rate, block, most, delay } = Object.fromEntries(Object.entries(part.dataset).map(([k, v]) => [k, Number(v)]));
// In the browser's thread for sound, which may not wait.
const COLLECT = `registerProcessor("collect", class extends AudioWorkletProcessor {
  constructor() { super(); this.held = new Float32Array(${Math.round(rate * block)}); this.filled = 0; }
  process([[samples]]) {
    for (const sample of samples ?? []) {
      this.held[this.filled++] = sample;
      if (this.filled === this.held.length) { this.port.postMessage(this.held.slice()); this.filled = 0; }
    }
    return true;
  }
});`;
const WAIT = 3000; // milliseconds without sound until the page says so
const QUIET = 1e-4; // samples up to this are silence: three steps of 16 bits, which no open microphone stays below
const NOTHING = "The microphone sends nothing: check that it is connected and not switched off.";
const SILENCE = "The microphone sends silence only: it may be muted, or the browser uses another one than you think.";
let microphone = null; // while it listens

function say(text) {
  find(".sslam-live-state").textContent = text;
}

function encode(blocks) {
  const samples = Int16Array.from(blocks.flatMap((held) => [...held.samples]), (x) => Math.max(-32768, Math.min(32767, Math.round(32768 * x))));
  let bytes = "";
  for (const byte of new Uint8Array(samples.buffer)) bytes += String.fromCharCode(byte);
  return btoa(bytes);
}

function show(state) {
  const latest = find(".sslam-live-latest");
  find(".sslam-live-events").innerHTML = state.html;
  if (latest.textContent !== state.latest) latest.textContent = state.latest;
}

async function start() {
  const mine = (microphone = { blocks: [], on: true });
  try {
    if (!navigator.mediaDevices) throw new Error("Browsers give the microphone only to pages that are encrypted, or on the same machine.");
    mine.stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
    mine.context = new AudioContext({ sampleRate: rate });
    const module = URL.createObjectURL(new Blob([COLLECT], { type: "text/javascript" }));
    await mine.context.audioWorklet.addModule(module);
    URL.revokeObjectURL(module);
    const begun = await server.live_start(null);
    if (begun.error) throw new Error(begun.error);
    mine.name = begun.name;
    const collect = new AudioWorkletNode(mine.context, "collect", { channelCount: 1, channelCountMode: "explicit", numberOfOutputs: 0 });
    mine.context.createMediaStreamSource(mine.stream).connect(collect);
    mine.arrived = mine.sounded = performance.now();
    collect.port.onmessage = ({ data }) => {
      mine.arrived = performance.now();
      if (data.some((sample) => Math.abs(sample) > QUIET)) mine.sounded = mine.arrived;
      mine.blocks.push({ samples: data, at: mine.arrived });
      send(mine);
    };
    if (!mine.on) close(mine); // stopped while the browser asked
    else {
      say("Listening.");
      mine.timer = setInterval(watch, 500, mine);
    }
  } catch (error) {
    if (!mine.on) close(mine);
    stop(mine, error.name === "NotAllowedError" ? "The browser does not give the microphone: allow it for this page." : error.message);
  }
}

// Says that no sound comes, and when it comes again.
function watch(mine) {
  const now = performance.now(), lack = now - mine.arrived > WAIT ? NOTHING : now - mine.sounded > WAIT ? SILENCE : "";
  if (lack !== (mine.lack ?? "")) say(lack || "Sound arrives again. Listening.");
  mine.lack = lack;
}

async function send(mine) {
  if (mine.sending || !mine.on) return;
  mine.sending = true;
  try {
    while (mine.on && mine.blocks.length) {
      if (mine.blocks.length * block > most) throw new Error("Sound comes faster than it is computed: try again when less is computed, or restart the page with a larger --live_hop.");
      const { at } = mine.blocks[0], state = await server.live_receive([mine.name, encode(mine.blocks.splice(0))]);
      if (state.error) throw new Error(state.error);
      const way = (performance.now() - at) / 1000;
      show(state);
      find(".sslam-level i").style.width = `${100 * state.level}%`;
      find(".sslam-live-delay").textContent = `Shown at most ${(delay + block + way).toFixed(1)} s after the end of a sound: ` +
        `${delay.toFixed(2)} s until the model has enough sound to decide, ${block} s to record a piece of it, and ${way.toFixed(2)} s, measured now, to send and compute it.`;
      find(".sslam-live-time").textContent = `${Math.floor(state.seconds)} s`;
    }
  } catch (error) {
    stop(mine, error.message);
  }
  mine.sending = false;
}

async function stop(mine, reason) {
  if (!mine.on) return;
  mine.on = false;
  microphone = null;
  find(".sslam-level i").style.width = "0";
  draw();
  say(reason);
  close(mine);
}

async function close(mine) {
  clearInterval(mine.timer);
  mine.stream?.getTracks().forEach((track) => track.stop());
  if (mine.context?.state !== "closed") mine.context?.close();
  const state = mine.name && (await server.live_stop(mine.name).catch(() => null));
  if (state?.html && !microphone) show(state);
}

function draw() {
  button.textContent = microphone ? "Stop" : "Start listening";
}

button.addEventListener("click", () => {
  if (microphone) stop(microphone, "Stopped.");
  else { say("Asking for the microphone"); start(); }
  draw();
});
