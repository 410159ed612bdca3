// Drives a running server with the HttpClient of the JDK, in its default settings, as LangChain4j and Spring do:
// `java JavaHttpClient.java BASE_URL`. Over http:// it offers HTTP/2 with every first request of a connection.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;

public class JavaHttpClient {
  static final String MODEL = "smollm2-135m-instruct";
  static final String QUESTION = "What is the capital of France?";
  static String base;
  static HttpClient client = HttpClient.newHttpClient();

  static HttpRequest post(String model, String method, String text, int tokens, String... headers) {
    String config = "\"generationConfig\": {\"maxOutputTokens\": " + tokens + ", \"temperature\": 0}";
    String body = "{\"contents\": [{\"parts\": [{\"text\": \"" + text + "\"}]}], " + config + "}";
    HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(base + "/v1beta/models/" + model + ":" + method));
    request.header("Content-Type", "application/json").header("x-goog-api-key", "any");
    if (headers.length > 0) request.headers(headers);
    return request.POST(HttpRequest.BodyPublishers.ofString(body)).build();
  }

  static HttpResponse<String> send(HttpRequest request) throws Exception {
    return client.send(request, HttpResponse.BodyHandlers.ofString());
  }

  static void expect(boolean holds, Object seen) {
    if (!holds) throw new AssertionError(String.valueOf(seen));
  }

  public static void main(String[] given) throws Exception {
    base = given[0];
    Map<String, Callable<Void>> checks = new LinkedHashMap<>();
    checks.put("text", () -> {
      HttpResponse<String> answer = send(post(MODEL, "generateContent", QUESTION, 32));
      expect(answer.statusCode() == 200 && answer.body().contains("Paris"), answer.body());
      expect(answer.version() == HttpClient.Version.HTTP_1_1, answer.version());
      return null;
    });
    checks.put("kept connection", () -> {
      for (int i = 0; i < 3; i++) expect(send(post(MODEL, "generateContent", QUESTION, 1)).statusCode() == 200, i);
      return null;
    });
    checks.put("stream", () -> {
      HttpRequest request = post(MODEL, "streamGenerateContent?alt=sse", QUESTION, 32);
      String lines = client.send(request, HttpResponse.BodyHandlers.ofLines()).body().collect(Collectors.joining("\n"));
      expect(lines.startsWith("data: ") && lines.contains("\"STOP\""), lines);
      return null;
    });
    checks.put("body of unknown length", () -> {
      byte[] body = "{\"contents\": [{\"parts\": [{\"text\": \"hi\"}]}]}".getBytes();
      HttpRequest.BodyPublisher chunked = HttpRequest.BodyPublishers.fromPublisher(HttpRequest.BodyPublishers.ofByteArray(body));
      URI uri = URI.create(base + "/v1beta/models/" + MODEL + ":countTokens");
      HttpResponse<String> answer = HttpClient.newHttpClient().send(HttpRequest.newBuilder(uri).POST(chunked).build(), HttpResponse.BodyHandlers.ofString());
      expect(answer.statusCode() == 200 && answer.body().contains("totalTokens"), answer.body());
      return null;
    });
    checks.put("continue", () -> {
      HttpRequest plain = post(MODEL, "generateContent", QUESTION, 1);
      HttpRequest request = HttpRequest.newBuilder(plain, (name, value) -> true).expectContinue(true).build();
      expect(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).statusCode() == 200, "not continued");
      return null;
    });
    checks.put("errors", () -> {
      HttpResponse<String> missing = send(post("no-such-model", "generateContent", "hi", 1));
      expect(missing.statusCode() == 404 && missing.body().contains("NOT_FOUND"), missing.body());
      HttpResponse<String> refused = send(post(MODEL, "generateContent", "hi", -1));
      expect(refused.statusCode() == 400 && refused.body().contains("INVALID_ARGUMENT"), refused.body());
      return null;
    });
    checks.put("silence", () -> {
      String words = UUID.randomUUID() + " " + "river stone lantern market copper window garden thunder ".repeat(230);
      HttpResponse<String> answer = send(post("endless", "streamGenerateContent?alt=sse", words, 8));
      expect(answer.statusCode() == 200 && answer.body().startsWith("data: "), answer.body());
      return null;
    });
    checks.put("error in a stream", () -> {
      HttpRequest hurried = post("endless", "streamGenerateContent?alt=sse", "hi", 30000, "X-Server-Timeout", "1");
      String body = send(hurried).body();
      String last = body.substring(body.lastIndexOf("\n\n") + 2);
      expect(last.startsWith("{\"error\":") && body.contains("data: " + last + "\n\n"), last);
      return null;
    });
    StringBuilder outcome = new StringBuilder();
    for (Map.Entry<String, Callable<Void>> check : checks.entrySet()) {
      String text = "ok";
      try {
        check.getValue().call();
      } catch (Throwable failure) {
        text = failure.toString().replaceAll("[^ -!#-\\[\\]-~]", " ");
      }
      outcome.append(outcome.length() > 0 ? ", " : "").append("\"" + check.getKey() + "\": \"" + text + "\"");
    }
    System.out.println("{\"version\": \"" + System.getProperty("java.version") + "\", \"outcome\": {" + outcome + "}}");
    System.exit(0);
  }
}
