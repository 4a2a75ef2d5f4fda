/* The search runs in a worker, and a browser lets no page that was opened from a folder start one. There, and only
   there, this gives it a frame of the same page in its place. */
(function () {
  if (location.protocol !== "file:") return;

  function IFrameWorker(url) {
    var self = this;
    this.listeners = [];
    this.waiting = [];
    this.ready = false;
    var frame = document.createElement("iframe");
    frame.hidden = true;
    frame.title = "search";
    document.body.appendChild(frame);
    this.frame = frame;
    var inside = frame.contentWindow;
    // What the worker's script says goes to the page as a message of the worker.
    inside.__answer = function (data) {
      var event = new MessageEvent("message", { data: data });
      self.listeners.forEach(function (listener) { listener.call(self, event); });
      if (self.onmessage) self.onmessage(event);
    };
    inside.__ready = function () {
      self.ready = true;
      self.waiting.splice(0).forEach(function (data) { self.postMessage(data); });
    };
    inside.document.open();
    inside.document.write(
      "<!doctype html><script>" +
      "window.postMessage = function (data) { parent.setTimeout(function () { __answer(data); }, 0); };" +
      "window.importScripts = function () {" +
      "  return Promise.all(Array.prototype.map.call(arguments, function (src) {" +
      "    return new Promise(function (done, failed) {" +
      "      var script = document.createElement('script');" +
      "      script.src = src; script.onload = done; script.onerror = failed;" +
      "      document.body.appendChild(script);" +
      "    });" +
      "  }));" +
      "};" +
      "<\/script><body><script src=\"" + new URL(url, location.href).href + "\" onload=\"__ready()\"><\/script></body>"
    );
    inside.document.close();
  }

  IFrameWorker.prototype.postMessage = function (data) {
    if (!this.ready) { this.waiting.push(data); return; }
    var inside = this.frame.contentWindow;
    setTimeout(function () {
      inside.dispatchEvent(new inside.MessageEvent("message", { data: data }));
    }, 0);
  };
  IFrameWorker.prototype.addEventListener = function (kind, listener) {
    if (kind === "message") this.listeners.push(listener);
  };
  IFrameWorker.prototype.removeEventListener = function (kind, listener) {
    this.listeners = this.listeners.filter(function (other) { return other !== listener; });
  };
  IFrameWorker.prototype.terminate = function () { this.frame.remove(); };

  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
})();
