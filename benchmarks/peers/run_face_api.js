// @vladmandic/face-api in node, on TensorFlow.js' WebAssembly backend (SIMD, one thread): TinyFaceDetector with its
// defaults, then the expression network; no landmarks. Speaks as harness.py does. The working folder has node_modules.
'use strict';
const fs = require('fs');
const path = require('path');
const { createRequire } = require('module');

const WARM_UP = 10;
const LEAST_FRAMES = 20;
const NAMES = {
  neutral: 'neutral', happy: 'happiness', sad: 'sadness', angry: 'anger', fearful: 'fear', disgusted: 'disgust',
  surprised: 'surprise',
};
const say = (event, values = {}) => fs.writeSync(1, `${JSON.stringify({ event, ...values })}\n`);
console.log = console.error;

function* pictures(source) {
  const size = source.height * source.width * 3;
  const file = fs.openSync(source.path, 'r');
  for (let i = 0; i < source.count; i++) {
    const picture = new Uint8Array(size);
    fs.readSync(file, picture, 0, size, i * size);
    yield { data: picture, shape: [source.height, source.width, 3] };
  }
  fs.closeSync(file);
}

async function timed(call, source, budget_s) {
  const ms = [];
  const given = [];
  const begun = performance.now();
  for (const picture of pictures(source)) {
    const started = performance.now();
    given.push(await call(picture));
    ms.push(performance.now() - started);
    if (ms.length >= LEAST_FRAMES && performance.now() - begun > budget_s * 1e3) break;
  }
  return { ms, given };
}

async function passes(call, source, budget_s) {
  const all = { ms: [], given: [] };
  while (all.ms.reduce((sum, ms) => sum + ms, 0) < 1e3) {
    const { ms, given } = await timed(call, source, budget_s);
    all.ms.push(...ms);
    all.given.push(...given);
  }
  return all;
}

async function warmUp(call, source) {
  let i = 0;
  for (const picture of pictures(source)) {
    if (i++ === WARM_UP) break;
    await call(picture);
  }
}

async function main() {
  const job = JSON.parse(fs.readFileSync(process.argv[2]));
  const from = createRequire(path.join(process.cwd(), 'package.json'));
  const tf = from('@tensorflow/tfjs');
  const wasm = from('@tensorflow/tfjs-backend-wasm');
  const faceapi = from('@vladmandic/face-api/dist/face-api.node-wasm.js');
  wasm.setWasmPaths(path.dirname(from.resolve('@tensorflow/tfjs-backend-wasm')) + path.sep);
  wasm.setThreadsCount(1);
  await tf.setBackend('wasm');
  await tf.ready();
  if (tf.getBackend() !== 'wasm') throw new Error(`the backend is ${tf.getBackend()}, expected wasm`);
  const models = path.join(path.dirname(from.resolve('@vladmandic/face-api/package.json')), 'model');
  await faceapi.nets.tinyFaceDetector.loadFromDisk(models);
  await faceapi.nets.faceExpressionNet.loadFromDisk(models);
  say('ready');

  const options = new faceapi.TinyFaceDetectorOptions();
  const frame = async (picture) => {
    const tensor = tf.tensor3d(picture.data, picture.shape, 'int32');
    const found = await faceapi.detectAllFaces(tensor, options).withFaceExpressions();
    tensor.dispose();
    return found.length;
  };
  const face = async (picture) => {
    const tensor = tf.tensor3d(picture.data, picture.shape, 'int32');
    const said = await faceapi.nets.faceExpressionNet.predictExpressions(tensor);
    tensor.dispose();
    return NAMES[said.asSortedArray()[0].expression];
  };

  if (job.ferplus !== null) {
    const names = [];
    for (const picture of pictures(job.ferplus)) names.push(await face(picture));
    say('said', { names });
    return;
  }
  let started = performance.now();
  await frame(pictures(job.clips[0]).next().value);
  say('first', { ms: performance.now() - started });
  started = performance.now();
  const cpu = process.cpuUsage();
  for (const clip of job.clips) {
    await warmUp(frame, clip);
    const { ms, given } = await passes(frame, clip, job.budget_s);
    say('frames', { clip: clip.name, ms, found: given });
  }
  await warmUp(face, job.faces);
  const { ms } = await passes(face, job.faces, job.budget_s);
  say('faces', { ms });
  const used = process.cpuUsage(cpu);
  const share = (used.user + used.system) / 1e3 / (performance.now() - started);
  const peak = /VmHWM:\s+(\d+)/.exec(fs.readFileSync('/proc/self/status', 'utf8'))[1];
  say('peak', { mb: peak * 1024 / 1e6, core_share: share });
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
